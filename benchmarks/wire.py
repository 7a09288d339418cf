"""The bytes that one layer sends in a training step, read from the system's TCP counters, and the formulas for them.

    python -m benchmarks.wire [--ranks 2 4] [--tokens 512] [--json results/wire_bytes.json]
    python -m benchmarks.wire --show results/wire_bytes.json [--png Figs/wire_bytes.png]     # for docs/scaling.md

Several processes on this machine communicate with gloo over TCP, and each asks the operating system how many bytes its
connections have sent, gloo's headers included; our own counting is not used. Three schemes run the same step: data
parallel (DDP around the whole layer), a copy per expert (what fastmoe sends: a token's vector to every chosen expert on
another rank, out and back, forward and backward), and `smoe.parallel`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.layer import SHAPES
from smoe import SMoE, record_routing
from smoe.errors import run_main
from smoe.parallel import ParallelGroups, parallelize, wire_bytes
from smoe.parallel.wire import count_pairs

KS = (1, 2, 4, 8, 12, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEMES = {
    "data_parallel": ("data parallel", "#555555", "s"),
    "copies": ("a copy per expert", "#D55E00", "^"),
    "ours": ("once per rank (ours)", "#0072B2", "o"),
}


def bytes_sent() -> int:
    """Bytes that all TCP connections of this process have sent, from Linux's tcp_info, without retransmissions."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed by now, or not TCP
            continue
        sent, again = struct.unpack_from("QQ", information, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
        total += sent - again
    return total


def measured(step: Callable[[], None]) -> int:
    """Bytes that this process sends during ``step``."""
    step()  # the first call opens connections and makes buckets
    dist.barrier()
    time.sleep(0.05)  # until the system has sent what it was given
    before = bytes_sent()
    step()
    dist.barrier()
    time.sleep(0.05)
    return bytes_sent() - before - barrier_bytes()


def barrier_bytes() -> int:
    before = bytes_sent()
    dist.barrier()
    time.sleep(0.05)
    return bytes_sent() - before


def copy_per_expert(indices: Tensor, num_experts: int, x: Tensor) -> None:
    """Sends what a training step with one copy of each token per chosen expert sends; computes nothing.

    Args:
        indices: (T, k) int64, the chosen experts of this rank's tokens.
        x: (T, d), their vectors.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = torch.bincount(indices.flatten(), minlength=num_experts)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts)
    send, receive = (c.view(world, -1).sum(1).tolist() for c in (counts, theirs))
    send[rank] = receive[rank] = 0
    order = indices.flatten().argsort(stable=True)
    rows = x[order // indices.shape[1]]
    elsewhere = (indices.flatten()[order] // (num_experts // world)) != rank
    out, received = rows[elsewhere].contiguous(), x.new_empty(sum(receive), x.shape[1])
    for _ in range(2):  # forward, backward
        dist.all_to_all_single(received, out, receive, send)
        dist.all_to_all_single(out, received, send, receive)


def run_rank(rank: int, world: int, store: str, shapes: list[str], tokens: int, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world)
    groups = ParallelGroups.create(world)
    rows = []
    for shape in shapes:
        d, n, h, _, activation = SHAPES[shape]
        for dtype, k in ((dtype, k) for dtype in DTYPES for k in KS):
            torch.manual_seed(0)
            activation_name = {"ReLU": "relu", "GELU": "gelu"}[activation.__name__]
            layer = parallelize(SMoE(d, n * h, n, k, activation=activation_name, seed=1), groups)
            torch.manual_seed(1 + rank)
            x = torch.randn(tokens, d, requires_grad=True)

            def step(module: torch.nn.Module, x: Tensor = x, dtype: str = dtype) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                    module(x).float().sum().backward()

            with record_routing(layer) as routings:
                step(layer)
            indices = routings[0].indices
            sent = {"ours": measured(lambda layer=layer, step=step: step(layer))}
            wide = x.detach().to(DTYPES[dtype])
            sent["copies"] = measured(lambda i=indices, wide=wide, n=n: copy_per_expert(i, n, wide))
            whole = DistributedDataParallel(SMoE(d, n * h, n, k, activation=activation_name, seed=1))
            sent["data_parallel"] = measured(lambda whole=whole, step=step: step(whole))
            pairs, copies = count_pairs(indices, n, world, rank)
            # On average over the ranks, a rank receives as many rows as it sends.
            exact = wire_bytes(tokens, d, k, n, world, d_expert=h, itemsize=wide.element_size(),
                               rows=(pairs, pairs), copies=(copies, copies))  # fmt: skip
            random = wire_bytes(tokens, d, k, n, world, d_expert=h, itemsize=wide.element_size())
            numbers = [*sent.values(), exact.ours, exact.fastmoe, exact.data_parallel]
            mean = torch.tensor(numbers, dtype=torch.float64)
            dist.all_reduce(mean.div_(world))
            names = ("ours", "copies", "data_parallel")
            rows.append({
                "shape": shape, "d_model": d, "num_experts": n, "d_expert": h, "tokens": tokens, "ranks": world,
                "dtype": dtype, "top_k": k,
                "measured": dict(zip(names, (round(v) for v in mean[:3].tolist()), strict=True)),
                "formula": dict(zip(names, (round(v) for v in mean[3:].tolist()), strict=True)),
                "random_routing": {"ours": round(random.ours), "copies": round(random.fastmoe)},
            })  # fmt: skip
    if rank == 0:
        Path(output).write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # destroying the group can hang: see smoe.errors


def run(world: int, shapes: list[str], tokens: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/store", shapes, tokens, f"{folder}/rows.json")
        torch.multiprocessing.spawn(run_rank, arguments, world)
        return json.loads(Path(arguments[-1]).read_text())


def tables(record: dict[str, Any], *only: tuple[str, str, int]) -> str:
    """Markdown, one table per (shape, dtype, number of ranks): measured bytes and their difference from the formula."""
    rows, parts = record["rows"], []
    for key in only or dict.fromkeys((row["shape"], row["dtype"], row["ranks"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["dtype"], row["ranks"]) == key]
        first = chosen[0]
        parts.append(
            f"{first['shape']} (d {first['d_model']}, {first['num_experts']} x {first['d_expert']}), "
            f"{first['dtype']}, {first['ranks']} ranks of {first['tokens']} tokens:\n\n"
            "| k | data parallel | a copy per expert | ours | ours / copies |\n|---|---|---|---|---|\n"
            + "".join(
                f"| {row['top_k']} | "
                + " | ".join(_cell(row, name) for name in ("data_parallel", "copies", "ours"))
                + f" | {row['measured']['ours'] / row['measured']['copies']:.2f} |\n"
                for row in chosen
            )
        )
    return "\n".join(parts)


def _cell(row: dict[str, Any], name: str) -> str:
    got, want = row["measured"][name], row["formula"][name]
    return f"{got:,} ({100 * (got - want) / want:+.2f} %)"


def draw(record: dict[str, Any], path: Path) -> None:
    """Plots bytes over k at the largest number of ranks in bf16; dots are measurements, lines the formulas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(row["ranks"] for row in record["rows"])
    rows = [row for row in record["rows"] if row["ranks"] == most and row["dtype"] == "bf16"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(4.2 * len(shapes), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0], shapes, strict=True):
        chosen = [row for row in rows if row["shape"] == shape]
        for name, (label, color, marker) in SCHEMES.items():
            ks = [row["top_k"] for row in chosen]
            axes.plot(ks, [row["formula"][name] / 1e6 for row in chosen], color=color, linewidth=1)
            measured = [row["measured"][name] / 1e6 for row in chosen]
            axes.plot(ks, measured, marker, color=color, label=label, markersize=5)
        first = chosen[0]
        axes.set_title(f"{shape}: d {first['d_model']}, {first['num_experts']} x {first['d_expert']}", fontsize=10)
        axes.set_xlabel("k")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#d9d9d9", linewidth=0.6)
    figure.axes[0].set_ylabel(f"MB sent per rank, layer and step\n({most} ranks of {rows[0]['tokens']} tokens, bf16)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shapes", nargs="+", default=["txl", "bert", "roberta"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per rank")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--show", type=Path, help="print the tables of this record instead of measuring")
    parser.add_argument("--png", type=Path, help="plot the record to this file")
    arguments = parser.parse_args()
    if arguments.show:
        record = json.loads(arguments.show.read_text())
    else:
        rows = [row for world in arguments.ranks for row in run(world, arguments.shapes, arguments.tokens)]
        record = {
            "what": "bytes sent per rank by one layer in one training step, mean over the ranks",
            "measured_by": "tcpi_bytes_sent of all TCP connections (gloo, one machine)",
            "torch": torch.__version__,
            "platform": platform.platform(),
            "rows": rows,
        }
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))
    if arguments.png:
        draw(record, arguments.png)


if __name__ == "__main__":
    run_main(main)
