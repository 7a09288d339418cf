"""Time a training step of the paper's Transformer-XL: dense, SMoE-Dropout, and the reference implementation.

    python -m benchmarks.transformer_xl_step [--reference CHECKOUT] [--json OUT] [--threads N] [--clock cpu]

A step is forward, backward, gradient clipping and Adam on random bytes, with full memory. All variants take turns
within one run, so that whatever else the machine does falls on all alike: compare ratios, not seconds of two runs.
On a busy machine `--threads 1 --clock cpu` counts the processor time that a step takes, however long it waits.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import smoe
from benchmarks.transformer_xl_reference import build_reference, run_reference
from transformer_xl import TransformerXL, TransformerXLConfig

BATCH, LENGTH, MEMORY = 8, 128, 128
TOP_KS = (8, 12, 16)
DROPOUTS = (0.0, 0.1)


def _step(model: nn.Module, loss_of: Callable[[], Tensor], precision: str, fused: bool) -> Callable[[], None]:
    """`fused` as each side trains: this repository with PyTorch's fused Adam, the reference with plain Adam."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2.5e-4, fused=fused)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()

    return run


def ours(precision: str, dropout: float, top_k: int | None = None) -> Callable[[], None]:
    """A step of this repository's model; `top_k` None means dense, else SMoE with 16 experts."""
    config = TransformerXLConfig(dropout=dropout)
    torch.manual_seed(0)

    def make_smoe(layer_index: int) -> nn.Module:
        return smoe.SMoE(config.d_model, config.d_hidden, num_experts=16, top_k=top_k)

    model = TransformerXL(config, None if top_k is None else make_smoe)
    ids, targets = torch.randint(0, config.vocab_size, (2, BATCH, LENGTH))
    memory = torch.randn(config.num_layers, BATCH, MEMORY, config.d_model)
    return _step(model, lambda: model(ids, targets, memory, MEMORY).loss, precision, fused=True)


def reference(checkout: str, precision: str, dropout: float) -> Callable[[], None]:
    """A step of the reference implementation's dense model, same sizes."""
    c = TransformerXLConfig(dropout=dropout)
    torch.manual_seed(0)
    sizes = {name: getattr(c, name) for name in ("vocab_size", "num_layers", "d_model", "num_heads", "d_head")}
    model = build_reference(
        checkout, **sizes, d_hidden=c.d_hidden, dropout=dropout, length=LENGTH, memory_length=MEMORY
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, c.init_std)
    ids, targets = torch.randint(0, c.vocab_size, (2, LENGTH, BATCH))
    memories = [torch.randn(MEMORY, BATCH, c.d_model) for _ in range(c.num_layers + 1)]
    return _step(model, lambda: run_reference(model, ids, targets, *memories)[0].mean(), precision, fused=False)


def measure(
    steps: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds by `clock` of `repeats` runs of each step, all taking turns, after one run of each that doesn't count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="checkout of github.com/kimiyoung/transformer-xl to compare with")
    parser.add_argument("--json", help="file for the numbers", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter

    rows = []
    print(f"{'precision':<10}{'model':<28}{'median ms':>10}{'min ms':>9}{'x dense':>9}{'x reference':>13}")
    for precision in options.precision:
        steps = {f"dense, dropout {p}": ours(precision, p) for p in DROPOUTS}
        steps |= {f"SMoE, k = {k}, dropout 0.1": ours(precision, 0.1, k) for k in TOP_KS}
        if options.reference:
            steps |= {f"reference, dropout {p}": reference(options.reference, precision, p) for p in DROPOUTS}
        medians = {}
        for name, seconds in measure(steps, options.repeats, clock).items():
            medians[name] = statistics.median(seconds)
            row = {"precision": precision, "model": name, "median_s": medians[name], "seconds": seconds}
            rows.append(row)
        for row in rows[-len(steps) :]:
            dropout = row["model"].rpartition(" ")[2]
            dense, other = medians[f"dense, dropout {dropout}"], medians.get(f"reference, dropout {dropout}")
            row["speed_over_dense"] = dense / row["median_s"]
            row["speed_over_reference"] = other and other / row["median_s"]
            against = f"{row['speed_over_reference']:>13.2f}" if other else f"{'-':>13}"
            median, best = row["median_s"] * 1e3, min(row["seconds"]) * 1e3
            print(
                f"{precision:<10}{row['model']:<28}{median:>10.0f}{best:>9.0f}{row['speed_over_dense']:>9.2f}{against}"
            )
    if options.json:
        record = {
            "what": f"training step, batch {BATCH} x {LENGTH} tokens, memory {MEMORY}, speeds as ratios of medians",
            "threads": torch.get_num_threads(),
            "clock": options.clock,
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
