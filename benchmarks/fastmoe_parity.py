"""How far SMoE on fastmoe's FMoE is from SMoE on PyTorch alone: outputs, all gradients, weights after training steps.

    python -m benchmarks.fastmoe_parity [--processes 1 2] [--device cpu] [--json OUT]

Both layers start from the same state dict and take the same steps of SGD, each with its own gradients, while k changes
from step to step. Needs fmoe: with its CUDA extension and --device cuda, or on a CPU with an fmoe_cuda written in
Python. It prints the largest differences; the record also says which fmoe, torch and device they were measured with.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoe import SMoE, record_routing
from smoe.errors import run_main
from smoe.fastmoe_available import fastmoe_obstacle, kernels_are_compiled
from smoe.parallel import ParallelGroups, gather_state, parallelize, shard_state, sync_expert_gradients
from smoe.router import ROUTERS, SCORES

D, H, N, V, TOKENS = 16, 64, 8, 50, 40
KS = (1, 2, N // 2, N, 2)  # and back: k may go down as well
KINDS: list[dict[str, Any]] = [
    {"activation": "gelu", "bias": False},
    {"activation": "silu", "gated": True},
    {"output_scale": "k"},
]


def cases() -> list[dict[str, Any]]:
    """Options of SMoE: every router with every score, and every kind of expert."""
    routed = [{"router": router, "score": score} for router in ROUTERS for score in SCORES]
    return routed + [{"router": "learned", **kind} for kind in KINDS]


def make_layer(engine: str, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> SMoE:
    """A layer whose router weights are so large that the score rules give clearly different weights."""
    layer = SMoE(D, H, N, engine=engine, vocab_size=V, seed=1, **options)
    if options.get("router") in ("random", "learned"):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            layer.router.weight.mul_(50)
            layer.router.bias.copy_(torch.randn(N, generator=generator))
    return layer.to(device, dtype)


def compare(
    options: dict[str, Any],
    groups: ParallelGroups | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """The largest differences |a - b| / (1 + |b|) between the engines, over one step at each k of ``KS``.

    With several ranks, the experts of the layer on fmoe are spread over them and each rank has tokens of its own (the
    last one has none in one step). The layer on PyTorch then computes the tokens of all ranks in one process.

    Raises:
        AssertionError: the engines routed a token differently.
    """
    groups = groups or ParallelGroups.create()
    torch.manual_seed(0)
    plain, fast = (make_layer(engine, device, dtype, **options) for engine in ("torch", "fastmoe"))
    for parameter in fast.parameters():
        torch.nn.init.zeros_(parameter)
    fast = parallelize(fast, groups)
    fast.load_state_dict(shard_state(plain.state_dict(), fast, groups))
    worst = {"output": 0.0, "gradient of x": 0.0, "gradients of parameters": 0.0, "weights": 0.0}

    def note(what: str, a: Tensor, b: Tensor) -> None:
        if a.numel():
            worst[what] = max(worst[what], ((a - b).abs() / (1 + b.abs())).max().item())

    for step, k in enumerate(KS):
        fast.zero_grad(), plain.zero_grad()
        for rank, inputs in enumerate(_inputs(step, groups.world_size, device, dtype)):
            # DDP and sync_expert_gradients average over ranks, so each rank's pass counts 1 / world_size here.
            routed, y, grad_x = _pass(plain, k, *inputs, seed=rank, weight=1 / groups.world_size)
            if rank == groups.rank:
                mine = _pass(fast, k, *inputs, seed=rank)
                assert torch.equal(mine[0], routed), f"{options}: routed differently at k = {k}"
                note("output", mine[1], y)
                note("gradient of x", mine[2], grad_x * groups.world_size)
        sync_expert_gradients(fast, groups)
        for name, parameter in fast.named_parameters():
            expected = plain.get_parameter(name).grad
            if name.startswith("experts."):
                expected = groups.scatter_experts(expected)
            elif groups.world_size > 1:
                torch.distributed.all_reduce(parameter.grad.div_(groups.world_size))
            note("gradients of parameters", parameter.grad, expected)
        for layer in (fast, plain):
            torch.optim.SGD(layer.parameters(), lr=0.01).step()
    # The other way: PyTorch loads the state that was trained on fmoe.
    whole = gather_state(fast.state_dict(), fast, groups)
    *_, inputs = itertools.islice(_inputs(0, groups.world_size, device, dtype), groups.rank + 1)
    y = _pass(fast, N // 2, *inputs, seed=0)[1]
    if groups.is_main:
        for name, value in plain.state_dict().items():
            note("weights", whole[name].to(value.device, dtype), value.to(dtype))
        plain.load_state_dict(whole)
        note("output", y, _pass(plain, N // 2, *inputs, seed=0)[1])
    return worst


def _inputs(step: int, ranks: int, device: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each rank: x, token ids, and the direction of the loss. With several, the last has no tokens in step 1."""
    generator = torch.Generator().manual_seed(step)
    for rank in range(ranks):
        tokens = 0 if step == 1 and 0 < rank == ranks - 1 else TOKENS // 2 + 7 * rank
        x, direction = torch.randn(2, 2, tokens, D, generator=generator)
        ids = torch.randint(V, (2, tokens), generator=generator)
        yield x.to(device, dtype), ids.to(device), direction.to(device, dtype)


def _pass(
    layer: SMoE, k: int, x: Tensor, ids: Tensor, direction: Tensor, seed: int, weight: float = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, output and gradient of x of one forward and backward pass; gradients of parameters add up."""
    torch.manual_seed(seed)  # the uniform router draws
    layer.top_k = k
    leaf = x.clone().requires_grad_()
    with record_routing(layer) as routings:
        y = layer(leaf, token_ids=ids)
    (routing,) = routings
    loss = (y * direction).sum()
    loss = loss if routing.balance_loss is None else loss + routing.balance_loss
    (loss * weight).backward()
    return routing.indices, y.detach(), leaf.grad


def fmoe_record() -> dict[str, Any]:
    """Which fmoe this is: version if installed, commit if a checkout, SHA-256 of its Python files, kind of kernels."""
    import fmoe

    folder = Path(fmoe.__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    try:
        version = metadata.version("fastmoe")
    except metadata.PackageNotFoundError:
        version = None
    git = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "version": version,
        "commit": git.stdout.strip() or None,
        "python_sha256": digest.hexdigest(),
        "kernels": "CUDA extension" if kernels_are_compiled() else "written in Python, for a CPU",
    }


def _rank(rank: int, processes: int, device: str, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{store}", rank=rank, world_size=processes)
    queue.put(_run(ParallelGroups.create(processes), device))
    torch.distributed.barrier()
    queue.close()
    queue.join_thread()  # what was put there is on its way
    os._exit(0)  # destroying the group can hang: see smoe.errors


def _run(groups: ParallelGroups, device: str) -> list[dict[str, float]]:
    return [compare(options, groups, device) for options in cases()]


def run(processes: int, device: str) -> list[dict[str, Any]]:
    """One record per case: its options, and the largest differences on any rank."""
    if processes == 1:
        by_rank = [_run(ParallelGroups.create(), device)]
    else:
        context = torch.multiprocessing.get_context("spawn")
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (processes, device, f"{folder}/store", queue)
            torch.multiprocessing.spawn(_rank, arguments, nprocs=processes)
            by_rank = [queue.get() for _ in range(processes)]
    records = []
    for options, *results in zip(cases(), *by_rank, strict=True):
        differences = {what: max(result[what] for result in results) for what in results[0]}
        records.append({"processes": processes, "options": options, "differences": differences})
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="expert-parallel ranks, one run per number"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    if obstacle := fastmoe_obstacle():
        raise ValueError(f"{obstacle}; docs/fastmoe.md says how to install it")
    record = {
        "what": "largest differences |a - b| / (1 + |b|) between SMoE on FMoE and SMoE on PyTorch, float32",
        "fmoe": fmoe_record(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "sizes": {"d_model": D, "d_hidden": H, "num_experts": N, "tokens of rank r": f"{TOKENS} + 14 r", "k": KS},
        "records": [],
    }
    for processes in options.processes:
        records = run(processes, options.device)
        record["records"] += records
        for entry in records:
            numbers = "  ".join(f"{what} {value:.1e}" for what, value in entry["differences"].items())
            print(f"{processes} process{'es' if processes > 1 else ''}, {entry['options']}: {numbers}", flush=True)
    record["worst"] = max(value for entry in record["records"] for value in entry["differences"].values())
    print(f"worst: {record['worst']:.1e}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
