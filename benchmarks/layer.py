"""Time forward + backward of the layer, or forward alone: ours, dense and peers, interleaved in one run.

    python -m benchmarks.layer [--shapes txl bert] [--dtype bf16] [--k 8 16] [--json OUT] [--png OUT] [--device cuda]
    python -m benchmarks.layer --inference --k 1 2 4 8 16
    python -m benchmarks.layer --shapes txl --dtype bf16 --k 8 16 --dropout 0.1   # against nn.Dropout in the dense MLP

Every repeat draws a new input, as training does, and all contenders take turns on it. Routing then gives every expert a
new number of rows each time, for which some matrix libraries compile new kernels.

One line is printed per k. All its numbers are ratios of medians to the dense MLP ``Linear, activation, Linear`` of the
same width, dtype and number of tokens: our time and its target; our FLOPs (forward, router included, by PyTorch's
counter); the time of the bare matrix products of k experts, with rows already gathered and nothing else done.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path

# Peers that don't pad the rows of an expert make oneDNN compile hundreds of kernels per repeat, which would evict those
# of all contenders from its cache of 1024. Must be set before torch is imported.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
# Keeps the profiler, which measures memory, from writing to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.options import parse, timing_parser, write_record  # noqa: E402
from benchmarks.peers import peers  # noqa: E402
from smoe import SMoE  # noqa: E402
from smoe.errors import run_main
from smoe.flops import count  # noqa: E402

# name: (d, N, h, T, activation), sizes of the paper
SHAPES = {
    "txl": (256, 16, 512, 2048, nn.ReLU),
    "txl_long": (256, 16, 512, 11264, nn.ReLU),
    "roberta": (768, 16, 192, 4096, nn.GELU),
    "bert": (768, 16, 384, 4096, nn.GELU),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}
NAMES = {nn.ReLU: "relu", nn.GELU: "gelu"}


def dense(d: int, hidden: int, activation: type[nn.Module], dropout: float = 0.0) -> nn.Module:
    """The dense MLP that everything is compared with: (T, d) -> (T, d)."""
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Linear(d, hidden), activation(), *drop, nn.Linear(hidden, d))


class Bare(nn.Module):
    """The matrix products of one layer at k and nothing else: six per expert, or the two of forward alone."""

    def __init__(
        self, d: int, n: int, h: int, tokens: int, k: int, dtype: torch.dtype, device: str, inference: bool
    ) -> None:
        super().__init__()
        self.inference = inference
        rows, options = tokens * k // n, {"dtype": dtype, "device": device}
        self.n = n
        self.x, self.hidden = torch.randn(rows, d, **options), torch.randn(rows, h, **options)
        self.up, self.down = torch.randn(n, h, d, **options), torch.randn(n, h, d, **options)
        self.out, self.hidden_out = torch.empty_like(self.x), torch.empty_like(self.hidden)
        self.grad = torch.empty(h, d, **options)

    def run(self) -> None:
        for e in range(self.n):
            torch.mm(self.x, self.up[e].t(), out=self.hidden_out)
            torch.mm(self.hidden, self.down[e], out=self.out)
            if self.inference:
                continue
            torch.mm(self.x, self.down[e].t(), out=self.hidden_out)
            torch.mm(self.hidden.t(), self.x, out=self.grad)
            torch.mm(self.hidden.t(), self.x, out=self.grad)
            torch.mm(self.hidden, self.up[e], out=self.out)


def step(layer: nn.Module, x: Tensor, grad: Tensor, autocast: bool) -> None:
    """Forward and backward, with the gradients of x and of all parameters."""
    leaf = x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = layer(leaf)
    y.backward(grad.to(y.dtype))


@torch.no_grad()
def infer(layer: nn.Module, x: Tensor, grad: Tensor, autocast: bool) -> None:
    """Forward alone."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        layer(x)


def peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes that ``run`` has allocated at once on the CPU, beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(
    shape: str,
    dtype: str,
    ks: list[int],
    repeats: int,
    device: str,
    clock: Callable[[], float],
    all_: bool,
    inference: bool,
    dropout: float,
) -> dict:
    """One record: seconds by contender, medians, ratios, FLOPs, peak memory."""
    run_pass = infer if inference else step
    d, n, h, tokens, activation = SHAPES[shape]
    torch.manual_seed(0)
    runs: dict[str, nn.Module] = {"dense": dense(d, n * h, activation, dropout)}
    for k in ks:
        runs[f"smoe k={k}"] = SMoE(d, n * h, n, k, activation=NAMES[activation], dropout=dropout)
    if all_:
        runs["dense, ours"] = SMoE(d, n * h, n, n, activation=NAMES[activation], router="uniform", score="sum")
        runs["dense, compiled"] = torch.compile(dense(d, n * h, activation))
        for k in ks:
            runs |= {f"{name} k={k}": p for name, p in peers(d, n, h, tokens, k, activation, device).items()}
            loop = SMoE(d, n * h, n, k, activation=NAMES[activation], compute="reference")
            runs[f"loop k={k}"] = loop  # what Hugging Face calls eager: expert after expert, with index_add_
    for layer in runs.values():
        layer.to(device=device, dtype=DTYPES[dtype])
    product = torch.bfloat16 if dtype != "fp32" else torch.float32
    bare = {f"products k={k}": Bare(d, n, h, tokens, k, product, device, inference) for k in ks}
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, *bare)}
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    for repeat in range(-2, repeats):
        x = torch.randn(tokens, d, device=device, dtype=DTYPES[dtype])
        grad = torch.randn_like(x)
        for name in list(seconds):
            sync()
            start = clock()
            try:
                bare[name].run() if name in bare else run_pass(runs[name], x, grad, dtype == "autocast")
            except Exception as error:  # a peer that can't run here must not end the comparison
                if name == "dense" or name.startswith("smoe"):
                    raise
                print(f"{shape} {dtype}: {name} left out: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                del seconds[name]
                continue
            sync()
            if repeat >= 0:
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    record = {"shape": shape, "d": d, "experts": n, "h": h, "tokens": tokens, "activation": NAMES[activation]}
    record |= {"pass": "forward" if inference else "forward + backward", "dtype": dtype, "dropout": dropout}
    record |= {"median_s": medians, "seconds": seconds}
    record["ratio_to_dense"] = {name: value / medians["dense"] for name, value in medians.items()}
    flops = {name: count(runs[name], x).true for name in ("dense", *(f"smoe k={k}" for k in ks))}
    record["flops_over_dense"] = {name: value / flops["dense"] for name, value in flops.items()}
    if device == "cpu":
        names = ["dense", *(f"smoe k={k}" for k in ks)]
        memory = {
            name: peak_bytes(lambda name=name: run_pass(runs[name], x, grad, dtype == "autocast")) for name in names
        }
        record["peak_bytes"] = memory
    return record


def lines(record: dict, ks: list[int]) -> list[str]:
    """One line per k; the columns are those of ``HEADER``."""
    n, ratio = record["experts"], record["ratio_to_dense"]
    dense_ratios = [value for name, value in ratio.items() if name.startswith("dense")]
    out = []
    for k in ks:
        ours = ratio[f"smoe k={k}"]
        unjudged = record["pass"] == "forward" or record["dropout"]
        target = math.inf if unjudged else 0.90 if k == n else k / n + 0.04
        verdict = "-" if target == math.inf else f"{target:.2f} {'ok' if ours <= target else 'over':>5}"
        flops = record["flops_over_dense"][f"smoe k={k}"]
        others = {
            m: v for m, v in ratio.items() if m.endswith(f" k={k}") and m.split(" k=")[0] not in ("smoe", "products")
        }
        best_dense = f"{ours / min(dense_ratios):.3f}" if len(dense_ratios) > 1 else "-"  # without peers there is one
        best = min(others, key=others.get) if others else None
        peer = f"{others[best] / ours:5.2f}x {best.split(' k=')[0]}" if best else "-"
        memory = "-"
        if "peak_bytes" in record:
            memory = f"{record['peak_bytes'][f'smoe k={k}'] / record['peak_bytes']['dense']:.2f}"
        out.append(
            f"{record['shape']:<9}{record['dtype']:<9}{k:>3}{ours:>8.3f}{verdict:>13}"
            f"{flops:>8.3f}{ratio[f'products k={k}']:>10.3f}{best_dense:>12}{memory:>8}   {peer}"
        )
    return out


HEADER = (
    f"{'shape':<9}{'dtype':<9}{'k':>3}{'ratio':>8}{'target':>7}{'':>6}{'FLOPs':>8}{'products':>10}"
    f"{'best dense':>12}{'memory':>8}   best peer"
)


def draw(records: list[dict], ks: list[int], path: Path) -> None:
    """One panel per shape and dtype: time over that of the dense MLP, at every k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, sharex=True)
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    for axis, record in zip(axes.flat, records, strict=False):
        ratio = record["ratio_to_dense"]
        names = dict.fromkeys(name.split(" k=")[0] for name in ratio if " k=" in name)
        for name in names:
            points = [(k, ratio[f"{name} k={k}"]) for k in ks if f"{name} k={k}" in ratio]
            axis.plot(*zip(*points, strict=True), marker="o", label=name, lw=2.5 if name == "smoe" else 1.2)
        axis.plot(ks, [k / record["experts"] for k in ks], "k:", lw=1, label="k / N")
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_title(f"{record['shape']} {record['dtype']}", fontsize=10)
        axis.set_ylim(0, min(4, 1.1 * max(ratio.values())))
    axes[0][0].legend(fontsize=7)
    axes[0][0].set_ylabel("time / dense MLP")
    axes[-1][0].set_xlabel("k activated experts")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "autocast", "fp32"])
    parser.add_argument("--k", nargs="+", type=int, default=[4, 8, 12, 16])
    parser.add_argument("--inference", action="store_true", help="forward alone, without gradients")
    parser.add_argument("--no_peers", action="store_true", help="only ours, dense and the bare products")
    parser.add_argument("--dropout", type=float, default=0.0, help="rate on the hidden units; leaves peers out")
    parser.add_argument("--png", type=Path, help="draw the ratios")
    options, clock = parse(parser, k=min(shape[1] for shape in SHAPES.values()))
    records = []
    print(HEADER)
    for dtype in options.dtype:
        for shape in options.shapes:
            record = measure(
                shape,
                dtype,
                options.k,
                options.repeats,
                options.device,
                clock,
                not (options.no_peers or options.dropout),
                options.inference,
                options.dropout,
            )
            records.append(record)
            print("\n".join(lines(record, options.k)), flush=True)
            write_record(options, "the layer, seconds; ratios of medians to the dense MLP", records=records)
    if options.png:
        draw(records, options.k, options.png)


if __name__ == "__main__":
    run_main(main)
