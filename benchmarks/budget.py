"""``smoe.fit_budget`` on a trained Transformer-XL, beside one k for all layers at the same cost.

    python -m benchmarks.budget RUN ... [--data data/enwik8] [--k 4 6 8 12] [--json results/budget.json]

RUN is a run folder of ``transformer_xl.train``. For each k the budget is what a pass with that k in every layer costs.
The k of the layers are fitted on the beginning of valid; then test is measured at both, as
``transformer_xl.evaluate`` does. Bits per byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoe
from smoe.errors import run_main
from smoe.flops import count
from smoe.train.evaluation import measure
from smoe.train.processes import Processes
from transformer_xl.data import evaluation_segments
from transformer_xl.evaluate import load_run
from transformer_xl.model import TransformerXL, TransformerXLOutput
from transformer_xl.train import LanguageModel


class Reader(nn.Module):
    """A Transformer-XL that reads segment after segment and keeps its memory, as in an evaluation."""

    def __init__(self, model: TransformerXL, memory_length: int) -> None:
        super().__init__()
        self.model, self.memory_length, self.memory = model, memory_length, None

    def forward(self, inputs: Tensor, targets: Tensor, is_first: bool) -> TransformerXLOutput:
        output = self.model(inputs, targets, None if is_first else self.memory, self.memory_length)
        self.memory = output.memory
        return output


def fit(task: LanguageModel, k: int, tokens: int, processes: Processes) -> dict[str, Any]:
    """The row of the budget that k in every layer costs; fitted on the first tokens of every row of valid."""
    c = task.config
    segments = evaluation_segments(task.data["valid"], c.eval_batch_size, c.eval_tgt_len, max_tokens=tokens)
    batches = [(*segment, i == 0) for i, segment in enumerate(segments)]
    reader = Reader(task.model, c.eval_mem_len)
    flops = count(reader, batches[0], k).true
    fitted = smoe.fit_budget(reader, batches, flops=flops)
    row = {"k": k, "fitted": fitted, "flops": flops, "fitted_flops": count(reader, batches[0], fitted).true}
    for name, ks in (("one_k", k), ("fitted", fitted)):
        row[f"test_{name}"] = round(measure(task, "test", ks, processes).values["bpc"], 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder")
    parser.add_argument("--data", default="data/enwik8")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 6, 8, 12])
    parser.add_argument("--tokens", type=int, default=65536, help="of valid, to fit on (default: 65536)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    record = {"what": "bits per byte with the k of every layer fitted to a budget, and with one k at the same cost"}
    record |= {"tokens": args.tokens, "torch": torch.__version__, "runs": []}
    for path in args.runs:
        config, model, _ = load_run(path)
        config = dataclasses.replace(config, data=args.data).resolved()
        task, processes = LanguageModel(config, 0, 1), Processes()
        processes.configure(config)
        task.model.load_state_dict(model.state_dict())
        described = {name: getattr(config, name) for name in ("method", "scale", "output_scale", "seed")}
        record["runs"].append(run := {**described, "rows": []})
        for k in args.k:
            run["rows"].append(row := fit(task, k, args.tokens, processes))
            print("  ".join(f"{name} {value}" for name, value in (described | row).items()), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
