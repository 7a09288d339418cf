"""The ``smoe`` command: what a model costs, how fast it is, what runs have shown.

The command line is the outermost layer: it alone reaches, when asked to, for the trainers' packages beside ``smoe``.
Everything is imported when used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import BAD_INPUT, clean_exit

_DESCRIPTION = "Sparse mixtures of experts as a training technique: counts, benchmarks and reports."


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
    with clean_exit("transformer_xl", "bert"):
        if argv[:1] == ["bench"]:  # what follows is the other program's to read, its --help too
            return _bench(argv[1:])
        if argv[:1] == ["report"]:
            return _report(argv[1:])
        options = _build_parser().parse_args(argv)
        return _flops(options)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="smoe", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{flops,bench,report}")
    flops = commands.add_parser(
        "flops",
        allow_abbrev=False,
        help="FLOPs and parameters of a model at every k, from shapes alone",
        description="FLOPs of one forward pass, parameters and bytes, from shapes alone: nothing is run or allocated. "
        "paper: linear layers only, as Table 1 counts. true: everything, attention included.",
    )
    source = flops.add_mutually_exclusive_group(required=True)
    source.add_argument("--table1", action="store_true", help="all cells of Table 1's FLOPs column beside the paper's")
    source.add_argument("--arch", choices=("transformer_xl", "bert", "roberta"), help="a model at the paper's sizes")
    source.add_argument("--model", metavar="PATH", help="a saved Hugging Face model (folder with config.json)")
    source.add_argument("--config", metavar="YAML", help="the config.yaml of a run, or a scale's YAML")
    flops.add_argument("--method", help="a row of Table 1, with --arch or --config (default: smoe_dropout)")
    flops.add_argument("--k", type=int, nargs="+", help="activated experts (default: all, a run's sweep, or as saved)")
    flops.add_argument("--num_experts", type=int, default=None, help="N, with --arch (default: 16)")
    flops.add_argument("--batch", type=int, help="sequences (default: Table 1's, a run's, or 1)")
    flops.add_argument("--seq_len", type=int, help="tokens of a sequence; needed with --model")
    flops.add_argument("--tgt_len", type=int, help="tokens of a Transformer-XL segment")
    flops.add_argument("--mem_len", type=int, help="remembered tokens of a Transformer-XL")
    flops.add_argument("--true", action="store_true", help="with --arch: build the model and count all of it")
    flops.add_argument("--step", action="store_true", help="with --arch or --config: a training step too")
    flops.add_argument("--json", action="store_true", help="print JSON")
    # Their arguments go to other programs untouched; here they are listed for --help alone.
    commands.add_parser("bench", add_help=False, help="time the layer against dense and peers (in a checkout)")
    commands.add_parser("report", add_help=False, help="tables and plots from finished runs")
    return parser


def _bench(argv: list[str]) -> int:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "layer.py").is_file():
        raise ValueError("bench: there is no benchmarks/layer.py beside the smoe package; run it from a checkout")
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.layer", *argv]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


def _report(argv: list[str]) -> int:
    try:
        from .run.report import main as report
    except ModuleNotFoundError as error:
        raise ValueError(f"report: needs the package {error.name}; pip install 'smoe[report]'") from None
    return report(argv) or 0


# ---- smoe flops


def _flops(options: argparse.Namespace) -> int:
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    given -= {"command", "json"}
    source = next(name for name in ("table1", "arch", "model", "config") if name in given)
    lengths = {"batch", "seq_len", "tgt_len", "mem_len"}
    allowed = {
        "table1": set(),
        "arch": {"method", "k", "num_experts", "true", "step", *lengths},
        "model": {"k", "batch", "seq_len", "true"},
        "config": {"method", "k", "true", "step", *lengths},
    }[source]
    if extra := sorted(given - allowed - {source}):
        raise ValueError(f"--{extra[0]} says nothing with --{source}; leave it out")
    run = {"table1": _flops_table1, "arch": _flops_arch, "model": _flops_model, "config": _flops_config}[source]
    result = run(options)
    print(json.dumps(result, indent=1) if options.json else _as_text(result))
    return 0


def _flops_table1(options: argparse.Namespace) -> dict[str, Any]:
    from .flops import table1

    return {"table": "Table 1, inference FLOPs by the paper's convention", "rows": table1()}


def _flops_arch(options: argparse.Namespace) -> dict[str, Any]:
    from .experts import check_divisible
    from .flops import masked_lm, paper_flops
    from .methods import get_method
    from .paper import check_k, sizes_of

    method, num_experts = options.method or "smoe_dropout", 16 if options.num_experts is None else options.num_experts
    sizes = sizes_of(options.arch, _lengths(options))
    check_divisible(sizes["d_hidden"], num_experts)
    routed = get_method(method).routed
    ks = options.k or ([num_experts] if routed else [None])
    for k in ks:
        check_k(method, k, num_experts)
    shape = {name: sizes[name] for name in ("batch", "seq_len", "tgt_len", "mem_len") if name in sizes}
    head = {"arch": options.arch, "method": method, "num_experts": num_experts if routed else None, **shape}
    if not (options.true or options.step):
        paper = [paper_flops(options.arch, method, k, num_experts=num_experts, **_lengths(options)) for k in ks]
        return {**head, "rows": [{"k": k, "paper": flops} for k, flops in zip(ks, paper, strict=True)]}
    if options.arch == "transformer_xl":
        config = _train_config(
            ["--method", method, "--run_dir", ".", "--scale", "paper", "--num_experts", str(num_experts)]
        )
        return {**head, "rows": _transformer_xl_rows(config, ks, shape, shape if options.step else None)}
    _need("transformers", "hf")
    model = masked_lm(options.arch, method, num_experts=num_experts)
    return {**head, "rows": _masked_lm_rows(model, method, ks, shape, options.step)}


def _flops_config(options: argparse.Namespace) -> dict[str, Any]:
    from .run.config import load_yaml

    _need("jsonargparse", "train")
    values = load_yaml(Path(options.config))
    if values.get("model") in ("bert", "roberta"):
        return _flops_masked_lm_config(options, values)
    argv = ["--config", options.config]
    if options.method or "method" not in values:
        argv += ["--method", options.method or "smoe_dropout"]
    if "run_dir" not in values:
        argv += ["--run_dir", "."]
    config = _train_config(argv)
    ks = options.k or config.sweep_ks()
    lengths = _lengths(options)
    shape = {name: lengths.get(name, getattr(config, f"eval_{name}")) for name in ("tgt_len", "mem_len")}
    shape = {"batch": lengths.get("batch", config.eval_batch_size), **shape}
    step = {"batch": config.batch_size, "tgt_len": config.tgt_len, "mem_len": config.mem_len} | lengths
    if "seq_len" in lengths:
        raise ValueError("--seq_len says nothing for a Transformer-XL; give --tgt_len and --mem_len")
    head = {"config": options.config, "arch": "transformer_xl", "method": config.method, **shape}
    return {**head, "rows": _transformer_xl_rows(config, ks, shape, step if options.step else None)}


def _flops_masked_lm_config(options: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    from .flops import masked_lm
    from .methods import get_method
    from .paper import sizes_of

    _need("transformers", "hf")
    arch, method = values["model"], options.method or values.get("method", "smoe_dropout")
    names = ("num_layers", "d_model", "num_heads", "d_hidden", "vocab_size", "seq_len")
    own = {name: values[name] for name in names if values.get(name) is not None}
    if values.get("batch_size") is not None:
        own["batch"] = values["batch_size"]
    sizes = sizes_of(arch, {**own, **_lengths(options)})
    model = masked_lm(arch, method, num_experts=values.get("num_experts", 16), **sizes)
    ks = options.k or values.get("sweep") or ([values.get("num_experts", 16)] if get_method(method).routed else [None])
    ks = ks if get_method(method).routed or options.k else [None]
    shape = {"batch": sizes["batch"], "seq_len": sizes["seq_len"]}
    head = {"config": options.config, "arch": arch, "method": method, **shape}
    return {**head, "rows": _masked_lm_rows(model, method, ks, shape, options.step)}


def _flops_model(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .flops import count

    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder}: no config.json there; give the folder of a saved Hugging Face model")
    if options.seq_len is None:
        raise ValueError("--seq_len is missing; give the tokens of a sequence")
    batch, seq_len = 1 if options.batch is None else options.batch, options.seq_len
    for name, value in (("seq_len", seq_len), ("batch", batch)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    _need("transformers", "hf")
    model = _saved_model(folder)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and seq_len > limit:
        raise ValueError(f"--seq_len is {seq_len}; this model has positions for {limit} tokens")
    if model.main_input_name != "input_ids":
        raise ValueError(f"--model {folder}: takes {model.main_input_name}, not token ids; use smoe.flops.count on it")
    inputs = {"input_ids": torch.empty(batch, seq_len, dtype=torch.int64, device="meta")}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    rows = [_row(k, count(model, inputs, k)) for k in options.k or [_own_k(model)]]
    return {"model": str(folder), "class": type(model).__name__, "batch": batch, "seq_len": seq_len, "rows": rows}


def _saved_model(folder: Path) -> Any:
    """A model that smoe saved, as saved; any other from its config alone, on the meta device."""
    import smoe

    marked = any("smoe" in path.name for path in folder.iterdir())
    if marked or '"smoe' in (folder / "config.json").read_text(encoding="utf-8"):
        if not hasattr(smoe, "from_pretrained"):
            raise ValueError(f"--model {folder}: was saved by smoe, and this version can't load it")
        return smoe.from_pretrained(folder).eval()
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {folder}: config.json can't be read: {' '.join(str(error).split())}") from None
    names = config.architectures or ["AutoModel"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(f"--model {folder}: transformers has no {names[0]}")
    with torch.device("meta"):
        model = model_class.from_config(config) if names[0] == "AutoModel" else model_class(config)
    return model.eval()


def _own_k(model: Any) -> int | None:
    from .control import get_top_k, smoe_layers

    k = get_top_k(model) if smoe_layers(model) else None
    return None if isinstance(k, list) else k


def _train_config(argv: list[str]) -> Any:
    _need("transformer_xl", "train")
    _need("jsonargparse", "train")
    from transformer_xl.config import CONFIG_DIR, TrainConfig

    from .run.config import parse_config

    return parse_config(TrainConfig, CONFIG_DIR, argv, prog="smoe flops")


def _transformer_xl_rows(
    config: Any, ks: Sequence[int | None], shape: dict[str, int], step: dict[str, int] | None
) -> list[dict[str, Any]]:
    import torch

    from .flops import transformer_xl_flops, transformer_xl_step_flops
    from .paper import check_k

    with torch.device("meta"):
        model = config.build_model()
    rows = []
    for k in ks:
        check_k(config.method, k, config.num_experts)
        row = {"k": k, **transformer_xl_flops(model, k, **shape)}
        if step is not None:
            row["step"] = transformer_xl_step_flops(model, config.method, k, **step)
        rows.append(row)
    return rows


def _masked_lm_rows(
    model: Any, method: str, ks: Sequence[int | None], shape: dict[str, int], step: bool
) -> list[dict[str, Any]]:
    import torch

    from .flops import count, count_step

    ids = torch.empty(shape["batch"], shape["seq_len"], dtype=torch.int64, device="meta")
    rows = []
    for k in ks:
        row = _row(k, count(model, {"input_ids": ids}, k))
        if step:
            row["step"] = count_step(model, method, {"input_ids": ids, "labels": ids}, k)
        rows.append(row)
    return rows


def _row(k: int | None, counted: Any) -> dict[str, Any]:
    sizes = (counted.params_total, counted.params_active, counted.weight_bytes)
    names = ("params_total", "params_active", "weight_bytes")
    return {"k": k, "paper": counted.paper_linear, "true": counted.true, **dict(zip(names, sizes, strict=True))}


def _lengths(options: argparse.Namespace) -> dict[str, int]:
    names = ("batch", "seq_len", "tgt_len", "mem_len")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _need(package: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"this needs the package {package}; pip install 'smoe[{extra}]'")


def _as_text(result: dict[str, Any]) -> str:
    rows = result["rows"]
    head = ", ".join(f"{key} {value}" for key, value in result.items() if key != "rows" and value is not None)
    table = [[*rows[0]]] + [[_cell(name, value) for name, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join([head, *lines])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("paper", "true", "step", "flops"):
        return f"{value / 1e9:.6g}e9" if value < 1e10 else f"{value / 1e10:.6g}e10"
    if name == "difference":
        return f"{100 * value:+.4f} %"
    return f"{value:,}" if isinstance(value, int) else str(value)
