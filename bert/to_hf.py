"""A run of ``bert.pretrain`` as a Hugging Face folder, to be fine-tuned or used anywhere.

    python -m bert.to_hf RUN --out DIR [--checkpoint last]

The MLPs become SMoE layers as ``smoe.modulize`` makes them (dense ones stay dense). ``smoe.from_pretrained(DIR)`` loads
the model, also under another head: ``smoe.from_pretrained(DIR, model=BertForSequenceClassification(...))``. The
tokenizer lies beside it: ``AutoTokenizer.from_pretrained(DIR)``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

import smoe
from bert.config import PretrainConfig
from bert.evaluate import load_run
from smoe.errors import Parser, run_main
from smoe.modulize.adopt import adopt_layers
from smoe.new_folder import new_folder
from smoe.train.resume import Checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m bert.to_hf", description="Writes a pretrained run as a Hugging Face folder.")
    parser.add_argument("run", help="a run folder of bert.pretrain")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    options = parser.parse_args(argv)
    with new_folder(options.out, "out") as folder:
        config, checkpoint = _write(options, folder)
    print(f"{config.model} after step {checkpoint.step}, {config.get_method().title}: {options.out}")


def _write(options: argparse.Namespace, folder: Path) -> tuple[PretrainConfig, Checkpoint]:
    config, source, checkpoint = load_run(options.run, options.checkpoint)
    if config.get_method().routed:
        smoe.set_top_k(source, config.eval_ks()[0])
        if config.d_hidden <= config.d_model:
            # Of a slimmed run: linear layers as narrow as that are not recognised as an MLP, and a wider one fits too.
            source.config.intermediate_size = 2 * config.d_model
    model = adopt_layers(type(source)(source.config), source)
    tokenizer_file = Path(options.run) / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ValueError(f"run: {tokenizer_file} is missing; a run of bert.pretrain puts it there")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), model_max_length=config.seq_len)
    ids = checkpoint.state["facts"]["vocabulary"]
    roles = {"cls": "start", "sep": "end", "pad": "pad", "mask": "mask", "unk": "unknown"}
    named = {f"{name}_token": tokenizer.convert_ids_to_tokens(ids[role]) for name, role in roles.items()}
    tokenizer.add_special_tokens(named)
    smoe.save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    return config, checkpoint


if __name__ == "__main__":
    run_main(main)
