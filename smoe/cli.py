"""The ``smoe`` command: what a model costs, how fast it is, what runs have shown, slimming, export.

Imports come when used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import BAD_INPUT, clean_exit
from .slim_options import add_slim_options

_DESCRIPTION = "Sparse mixtures of experts as a training technique: counts, benchmarks, reports, slimming and export."
_LENGTHS = {
    "batch": "sequences",
    "seq_len": "tokens of a sequence",
    "tgt_len": "tokens of a Transformer-XL segment",
    "mem_len": "remembered tokens of a Transformer-XL",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from . import __version__

        print(f"smoe {__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` by default); the exit code is returned.

    Raises SystemExit for ``--help`` (0) and, after one line on stderr, for bad input (2).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with clean_exit():
        if argv[:1] == ["bench"]:  # the other program reads what follows, its --help too
            return _bench(argv[1:])
        if argv[:1] == ["report"]:
            from .report.command import main as report

            return report(argv[1:]) or 0
        options = _build_parser().parse_args(argv)
        return {"flops": _flops, "slim": _slim, "export": _export}[options.command](options)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="smoe", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{flops,slim,export,bench,report}")
    flops = commands.add_parser(
        "flops",
        allow_abbrev=False,
        help="FLOPs and parameters of a model at every k, from shapes alone",
        description="FLOPs of one forward pass, parameters and bytes, from shapes alone: nothing is run or allocated. "
        "paper: linear layers only, as Table 1 counts. true: everything, attention included.",
        epilog="The configuration of a run and training steps: python -m transformer_xl.flops, python -m bert.flops.",
    )
    source = flops.add_mutually_exclusive_group(required=True)
    source.add_argument("--table1", action="store_true", help="all cells of Table 1's FLOPs column beside the paper's")
    source.add_argument("--arch", choices=("transformer_xl", "bert", "roberta"), help="a model at the paper's sizes")
    source.add_argument("--model", metavar="PATH", help="a saved Hugging Face model (folder with config.json)")
    add_flops_options(flops, *_LENGTHS)
    slim = commands.add_parser(
        "slim",
        allow_abbrev=False,
        help="write a model with fewer experts, those that data vote for",
        description="Keeps the experts of each layer that the data vote for and removes the others: fewer parameters, "
        "less memory, smaller files. Nothing is trained: fine-tune the result, with all of its experts active.",
    )
    source = slim.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="a run folder of transformer_xl or bert")
    source.add_argument(
        "--model", metavar="PATH", help="a saved Hugging Face model with SMoE layers, and its tokenizer"
    )
    votes = "with --run a folder like that of the run (default: the run's); with --model a file, one text per line"
    slim.add_argument("--data", metavar="PATH", help=f"what votes: {votes}")
    slim.add_argument("--checkpoint", choices=("best", "last"), help="of the run (default: best)")
    add_slim_options(slim)
    export = commands.add_parser(
        "export",
        allow_abbrev=False,
        help="write a saved model in a format that other software runs",
        description="hf: a modulized Llama or Mistral becomes a Mixtral of Transformers, a Qwen3 a Qwen3-MoE. They "
        "compute the same at every k: AutoModelForCausalLM.from_pretrained(DIR, num_experts_per_tok=K).",
    )
    export.add_argument("path", metavar="PATH", help="folder that smoe.save_pretrained or a Trainer wrote")
    export.add_argument("--to", required=True, choices=("hf",), help="the format")
    export.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    export.add_argument("--k", type=int, help="of the exported model, unless another is asked for (default: as saved)")
    export.add_argument("--metrics", metavar="JSON", help='for the model card, such as {"8": {"BPC": 1.21}} by k')
    # Their arguments go to other programs untouched; here they are listed for --help alone.
    commands.add_parser("bench", add_help=False, help="time the layer against dense and peers (in a checkout)")
    commands.add_parser("report", add_help=False, help="tables and plots from finished runs")
    return parser


def _bench(argv: list[str]) -> int:
    return _run_beside("bench", "benchmarks.layer", argv)


def _run_beside(command: str, module: str, argv: list[str]) -> int:
    """``python -m MODULE ARGV``, a module of the checkout that lies beside the smoe package; its exit code."""
    checkout, file = Path(__file__).resolve().parents[1], f"{module.replace('.', '/')}.py"
    if not (checkout / file).is_file():
        raise ValueError(f"{command}: there is no {file} beside the smoe package; run it from a checkout")
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, "-m", module, *argv], env={**os.environ, "PYTHONPATH": path}).returncode


# ---- what every command that counts FLOPs shares


def add_flops_options(parser: argparse.ArgumentParser, *lengths: str) -> None:
    """Adds --method, --k, --num_experts, the lengths that a model has, and --json."""
    parser.add_argument("--method", help="a row of Table 1 (default: smoe_dropout)")
    parser.add_argument("--k", type=int, nargs="+", help="activated experts (default: all, or a run's sweep)")
    parser.add_argument("--num_experts", type=int, help="N (default: 16)")
    for name in lengths:
        parser.add_argument(f"--{name}", type=int, help=f"{_LENGTHS[name]} (default: Table 1's)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --scale, whose values take the place of the other options' defaults, and --step."""
    parser.add_argument("--config", metavar="YAML", help="of a run; its values are the defaults")
    parser.add_argument("--scale", help="whose sizes are the defaults (default: that of --config, else paper)")
    parser.add_argument("--step", action="store_true", help="a training step too")


def given_lengths(options: argparse.Namespace) -> dict[str, int]:
    """The lengths that the command line gives."""
    values = {name: getattr(options, name, None) for name in _LENGTHS}
    return {name: value for name, value in values.items() if value is not None}


def read_config(config_class: type, options: argparse.Namespace) -> Any:
    """The configuration that the command line asks for: a file's or the paper's, with the flags given."""
    need("jsonargparse", "train")
    from .train.command import parse_config
    from .yaml_files import load_yaml

    file = {} if options.config is None else load_yaml(Path(options.config))
    defaults = {"method": "smoe_dropout", "run_dir": ".", "scale": "paper"}
    flags = {name: value for name, value in defaults.items() if name not in file}
    given = {name: getattr(options, name, None) for name in ("model", "method", "num_experts", "scale")}
    flags |= {name: str(value) for name, value in given.items() if value is not None}
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    if options.config is not None:
        argv += ["--config", options.config]
    return parse_config(config_class, argv)


def flops_row(k: int | None, counted: Any) -> dict[str, Any]:
    """One line of a table: k and a ``smoe.flops.FlopCount``."""
    values = dataclasses.asdict(counted)
    return {"k": k, "paper": values.pop("paper_linear"), **values}


def print_flops(result: dict[str, Any], as_json: bool) -> None:
    """Prints ``rows`` as a table under a line with all else that ``result`` holds, or everything as JSON."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    rows = result["rows"]
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows" and value is not None))
    table = [[*rows[0]]] + [[_cell(name, value) for name, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def need(package: str, extra: str) -> None:
    """ValueError that says what to install, unless ``package`` is there."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"this needs the package {package}; pip install 'smoe[{extra}]'")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("paper", "true", "step", "flops"):
        return f"{value / 1e9:.6g}e9" if value < 1e10 else f"{value / 1e10:.6g}e10"
    if name == "difference":
        return f"{100 * value:+.4f} %"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- smoe flops


def _flops(options: argparse.Namespace) -> int:
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    source = next(name for name in ("table1", "arch", "model") if name in given)
    allowed = {"table1": set(), "arch": {"method", "k", "num_experts", *_LENGTHS}, "model": {"k", "batch", "seq_len"}}
    if extra := sorted(given - allowed[source] - {source, "command", "json"}):
        raise ValueError(f"--{extra[0]} has no effect with --{source}; leave it out")
    run = {"table1": _flops_table1, "arch": _flops_arch, "model": _flops_model}[source]
    print_flops(run(options), options.json)
    return 0


def _flops_table1(options: argparse.Namespace) -> dict[str, Any]:
    from .paper import table1

    return {"table": "Table 1, inference FLOPs by the paper's convention", "rows": table1()}


def _flops_arch(options: argparse.Namespace) -> dict[str, Any]:
    from .experts import check_divisible
    from .methods import get_method
    from .paper import paper_flops, sizes_of

    method, num_experts = options.method or "smoe_dropout", 16 if options.num_experts is None else options.num_experts
    lengths = given_lengths(options)
    sizes = sizes_of(options.arch, lengths)
    check_divisible(sizes["d_hidden"], num_experts)
    routed = get_method(method).routed
    head = {"arch": options.arch, "method": method, "num_experts": num_experts if routed else None}
    head |= {name: sizes[name] for name in _LENGTHS if name in sizes}
    rows = [
        {"k": k, "paper": paper_flops(options.arch, method, k, num_experts=num_experts, **lengths)}
        for k in options.k or ([num_experts] if routed else [None])
    ]
    return {**head, "rows": rows}


def _flops_model(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .flops import count

    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder}: no config.json there; give the folder of a saved Hugging Face model")
    if options.seq_len is None:
        raise ValueError("--seq_len is missing; give the number of tokens of a sequence")
    batch, seq_len = 1 if options.batch is None else options.batch, options.seq_len
    for name, value in (("seq_len", seq_len), ("batch", batch)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    need("transformers", "hf")
    model = _saved_model(folder)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and seq_len > limit:
        raise ValueError(f"--seq_len is {seq_len}; this model has positions for {limit} tokens")
    if model.main_input_name != "input_ids":
        raise ValueError(f"--model {folder}: takes {model.main_input_name}, not token ids; use smoe.flops.count on it")
    inputs = {"input_ids": torch.empty(batch, seq_len, dtype=torch.int64, device="meta")}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    rows = [flops_row(k, count(model, inputs, k)) for k in options.k or [_own_k(model)]]
    return {"model": str(folder), "class": type(model).__name__, "batch": batch, "seq_len": seq_len, "rows": rows}


def _saved_model(folder: Path) -> Any:
    """A model that smoe saved, as saved; any other from its config alone, on the meta device."""
    import smoe

    from .modulize.build import build_shell
    from .modulize.folder import CONFIG, OWN_CONFIG, read_json
    from .modulize.hook import is_marked

    if (folder / OWN_CONFIG).is_file() or "smoe" in (settings := read_json(folder / CONFIG)) or is_marked(settings):
        return smoe.from_pretrained(folder).eval()
    return build_shell(folder).eval()


def _own_k(model: Any) -> int | None:
    from .control import get_top_k, smoe_layers

    k = get_top_k(model) if smoe_layers(model) else None
    return None if isinstance(k, list) else k


# ---- smoe slim


def _slim(options: argparse.Namespace) -> int:
    if options.run is not None:
        return _slim_run(options)
    if options.checkpoint is not None:
        raise ValueError("--checkpoint has no effect with --model; leave it out")
    if options.data is None:
        raise ValueError("--data is missing; give a file with one text per line, which votes for the experts")
    need("transformers", "hf")
    from .slim_saved import slim_saved

    slim_saved(Path(options.model), Path(options.data), options)
    return 0


def _slim_run(options: argparse.Namespace) -> int:
    """By the program that the run is of: this package knows no model."""
    need("accelerate", "train")
    from .train.resume import read_config as recorded_config

    module = "bert.slim" if "model" in recorded_config(options.run) else "transformer_xl.slim"
    names = ("keep", "out", "data", "checkpoint", "k", "score", "batches")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return _run_beside(
        "slim", module, [options.run, *(word for name, v in given.items() for word in (f"--{name}", str(v)))]
    )


# ---- smoe export


def _export(options: argparse.Namespace) -> int:
    need("transformers", "hf")
    import smoe

    from .export import to_hf

    if Path(options.out).resolve() == Path(options.path).resolve():
        raise ValueError(f"--out is {options.out}, the model itself; it must be another folder")
    metrics = None if options.metrics is None else _read_metrics(Path(options.metrics))
    model = smoe.from_pretrained(options.path)
    out = to_hf(model, options.out, top_k=options.k, metrics=metrics)
    print(f"{out}: {json.loads((out / 'config.json').read_text(encoding='utf-8'))['architectures'][0]}")
    return 0


def _read_metrics(file: Path) -> dict[int, dict[str, float]]:
    """k -> name -> value from a JSON file."""
    from .json_files import load_json

    try:
        rows = load_json(file, nan=False)
        return {int(k): {name: float(value) for name, value in row.items()} for k, row in rows.items()}
    except (ValueError, AttributeError, TypeError, OverflowError):
        raise ValueError(f'--metrics {file}: it must be JSON like {{"8": {{"BPC": 1.21}}}}, by k') from None
