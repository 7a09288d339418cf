"""Rows of one batch with different k in one pass (``smoe.activated(model, tensor)``), beside the same pass at one k.

    python -m benchmarks.k_per_row [--shapes roberta bert] [--dtype bf16] [--json results/k_per_row.json]

A batch of 16 rows has two kinds of requests, cheap and dear. Contenders take turns on the same input:

mixed     one pass in which every row has its own k
mean      one pass at the mean k for all rows: as many products of tokens and experts
separate  one pass per kind, with that kind's rows
largest   one pass at the largest k for all rows

One line per mix: medians as ratios to ``mean``. The target is 1.15 for ``mixed``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import smoe
from benchmarks.layer import DTYPES, NAMES, SHAPES, infer, step
from benchmarks.options import parse, timing_parser, write_record
from smoe.errors import run_main

ROWS = 16
# The k of all 16 rows; each mix has a whole number as its mean.
MIXES = {"8 x 4, 8 x 12": [4, 12] * 8, "12 x 2, 4 x 14": [2, 2, 14, 2] * 4, "14 x 2, 2 x 10": ([2] * 7 + [10]) * 2}


def contenders(layer: smoe.SMoE, ks: list[int], run: Callable[[Tensor], None]) -> dict[str, Callable[[Tensor], None]]:
    """name -> what computes x (16, tokens, d)."""
    mean, remainder = divmod(sum(ks), ROWS)
    assert not remainder and len(ks) == ROWS
    k_per_row = torch.tensor(ks)
    rows = {k: (k_per_row == k).nonzero().flatten() for k in sorted(set(ks))}

    def at(k: int | Tensor) -> Callable[[Tensor], None]:
        def compute(x: Tensor) -> None:
            with smoe.activated(layer, k):
                run(x)

        return compute

    def separate(x: Tensor) -> None:
        for k, of_k in rows.items():
            at(k)(x[of_k.to(x.device)])

    return {"mixed": at(k_per_row), "mean": at(mean), "separate": separate, "largest": at(max(ks))}


def measure(shape: str, dtype: str, mix: str, inference: bool, options, clock: Callable[[], float]) -> dict:
    """One record: median seconds by contender, and their ratios to ``mean``."""
    d, n, h, tokens, activation = SHAPES[shape]
    torch.manual_seed(0)
    layer = smoe.SMoE(d, n * h, n, activation=NAMES[activation]).to(options.device, DTYPES[dtype])
    run_pass, autocast = infer if inference else step, dtype == "autocast"
    runs = contenders(layer, MIXES[mix], lambda x: run_pass(layer, x, x, autocast))
    sync = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-2, options.repeats):
        x = torch.randn(ROWS, tokens // ROWS, d, device=options.device, dtype=DTYPES[dtype])
        for name, compute in runs.items():
            sync()
            start = clock()
            compute(x)
            sync()
            if repeat >= 0:  # the first two warm up
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: round(median / medians["mean"], 3) for name, median in medians.items()}
    record = {"shape": shape, "dtype": dtype, "pass": "forward" if inference else "forward and backward"}
    record |= {"k_of_rows": mix, "mean_k": sum(MIXES[mix]) // ROWS, "repeats": options.repeats}
    return record | {"median_s": {name: round(s, 6) for name, s in medians.items()}, "ratio_to_mean": ratios}


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["txl", "roberta", "bert"])
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["fp32", "bf16"])
    options, clock = parse(parser)
    records = []
    for shape in options.shapes:
        for dtype in options.dtype:
            for inference in (True, False):
                for mix in MIXES:
                    record = measure(shape, dtype, mix, inference, options, clock)
                    records.append(record)
                    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in record["ratio_to_mean"].items())
                    print(f"{shape} {dtype} {record['pass']}, k {mix}: {ratios}", flush=True)
                    write_record(
                        options, "rows with different k in one pass, seconds; ratios to the mean k", records=records
                    )


if __name__ == "__main__":
    run_main(main)
