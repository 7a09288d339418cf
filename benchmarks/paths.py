"""Times `grouped` and `dense` on drawn shapes: how good is the choice of `auto` between them?

    python -m benchmarks.paths [--seconds 300] [--seed 1] [--threads 1] [--clock cpu] [--json OUT]

A shape has 64 to 8192 tokens, 4 to 64 experts of 16 to 512 hidden units, d from 64 to 1024 and any k below N, in bf16
or float32, forward alone or with backward, with ReLU or GELU, some with gates. Printed are times over those of the
faster path: of `auto`, of either path always, and of `auto` where it is worst. The constants that `auto` goes by are in
smoe/compute/choose.py; the record has all times, so that they can be fitted again.
"""

from __future__ import annotations

import random
import time
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.options import medians, parse, timing_parser, write_record
from smoe import SMoE
from smoe.compute import PATHS, choose
from smoe.errors import run_main

MOST = 6_000_000_000  # multiply-adds of a pass through all experts' first layers


def drawn(rng: random.Random) -> dict[str, Any]:
    """A shape and how it is passed."""
    while True:
        num_experts, k_share = rng.choice([4, 8, 16, 32, 64]), rng.choice([rng.random(), 2 ** -rng.uniform(0, 4)])
        shape = {
            "tokens": int(2 ** rng.uniform(6.1, 13)),
            "d": rng.choice([64, 128, 256, 384, 512, 768, 1024]),
            "h": int(2 ** rng.uniform(4, 9)),
            "experts": num_experts,
            "k": min(max(int(num_experts * k_share), 1), num_experts - 1),
            "gated": rng.random() < 0.2,
            "activation": rng.choice(["gelu", "relu"]),
            "dtype": rng.choice(["bf16", "fp32"]),
            "backward": rng.random() < 0.5,
        }
        if shape["tokens"] * num_experts * shape["h"] * shape["d"] <= MOST:
            return shape


def run(layer: SMoE, path: str, bf16: bool, backward: bool, x: Tensor) -> None:
    layer.compute = path
    with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    if backward:
        y.sum().backward()
        layer.zero_grad()


def measure(shape: dict[str, Any], repeats: int, clock: Any) -> dict[str, Any]:
    """The shape with what ``auto`` takes, and the median seconds of both paths."""
    num_experts, bf16 = shape["experts"], shape["dtype"] == "bf16"
    options = {"activation": shape["activation"], "gated": shape["gated"], "seed": 0}
    layer = SMoE(shape["d"], num_experts * shape["h"], num_experts, shape["k"], **options)
    x = torch.randn(shape["tokens"], shape["d"], requires_grad=shape["backward"])
    with torch.set_grad_enabled(shape["backward"]), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        chosen = choose("auto", x, layer.experts, layer.router(x))
    runs = {path: partial(run, layer, path, bf16, shape["backward"]) for path in ("grouped", "dense")}
    auto = next(name for name, path in PATHS.items() if path is chosen)
    return {**shape, "auto": auto, "seconds": medians(runs, x, repeats, clock)}


def summary(rows: list[dict[str, Any]], dtype: str) -> str:
    """A line on the shapes of a dtype."""
    rows = [row for row in rows if row["dtype"] == dtype]
    over = {
        name: [row["seconds"][row["auto"] if name == "auto" else name] / min(row["seconds"].values()) for row in rows]
        for name in ("auto", "grouped", "dense")
    }
    means = ", ".join(f"{name} {geometric_mean(ratios):.3f}" for name, ratios in over.items())
    return f"{dtype}, {len(rows)} shapes, times over the faster path: {means}; auto at worst {max(over['auto']):.2f}"


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="how long to go on drawing shapes")
    parser.add_argument("--seed", type=int, default=1, help="of the shapes")
    options, clock = parse(parser, seconds=None)
    if options.device != "cpu":
        raise ValueError(f"--device is {options.device}; it must be cpu, where auto chooses by these times")
    rng, rows, end = random.Random(options.seed), [], time.monotonic() + options.seconds
    torch.manual_seed(options.seed)
    what = "grouped and dense on drawn shapes, median seconds, and which of them auto takes"
    while time.monotonic() < end:
        rows.append(measure(drawn(rng), options.repeats, clock))
        write_record(options, what, seed=options.seed, records=rows)
    for dtype in ("bf16", "fp32"):
        if any(row["dtype"] == dtype for row in rows):
            print(summary(rows, dtype))


if __name__ == "__main__":
    run_main(main)
