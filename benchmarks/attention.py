"""Attention of short sequences on a CPU: plain matrix products beside PyTorch's kernel.

    python -m benchmarks.attention [--threads 1] [--json results/attention.json]

2048 tokens in rows of one length, a multi-head attention of BERT's at scale cpu (4 heads of width 32), laid out as the
model lays it out, with padding masked. One line per length and dtype: medians in milliseconds of forward and backward
together, and of forward alone. The limits in ``bert/attention.py`` come from these figures.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.options import medians, parse, timing_parser, write_record
from bert.attention import by_products
from smoe.errors import run_main

TOKENS, HEADS, WIDTH = 2048, 4, 32
LENGTHS = (32, 64, 128, 192, 256, 512)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure(length: int, dtype: torch.dtype, repeats: int, clock) -> dict[str, dict[str, float]]:
    """Median seconds of each contender, under ``step`` and under ``forward``."""
    module = nn.Module()
    module.is_causal = False
    torch.manual_seed(0)
    rows = TOKENS // length
    drawn = [torch.randn(rows, length, HEADS, WIDTH, dtype=dtype).transpose(1, 2) for _ in range(3)]
    given = [x.requires_grad_() for x in drawn]
    there = torch.arange(length).expand(rows, 1, 1, length) < torch.randint(1, length + 1, (rows, 1, 1, 1))
    contenders = {
        "products": lambda q, k, v: by_products(q, k, v, there, WIDTH**-0.5),
        "fused": lambda q, k, v: sdpa_attention_forward(module, q, k, v, there, scaling=WIDTH**-0.5)[0],
    }

    def step(attend):
        return lambda inputs: attend(*inputs).sum().backward()

    def forward(attend):
        return torch.no_grad()(lambda inputs: attend(*inputs))

    return {
        part.__name__: medians({name: part(run) for name, run in contenders.items()}, given, repeats, clock)
        for part in (step, forward)
    }


def main() -> None:
    options, clock = parse(timing_parser(__doc__))
    if options.device != "cpu":
        raise ValueError("--device is cuda, where PyTorch's kernel is always used; there is nothing to compare")
    records = []
    for name, dtype in DTYPES.items():
        for length in LENGTHS:
            seconds = measure(length, dtype, options.repeats, clock)
            records.append({"dtype": name, "length": length, "seconds": seconds})
            cells = (f"{part} {s['products'] * 1e3:.1f} / {s['fused'] * 1e3:.1f} ms" for part, s in seconds.items())
            print(f"{name}, {TOKENS // length} x {length} tokens, products / fused: {', '.join(cells)}", flush=True)
            write_record(options, "attention of 2048 tokens, 4 heads of width 32, seconds", records=records)


if __name__ == "__main__":
    run_main(main)
