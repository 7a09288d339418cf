"""Estimates: how long a layer's messages take on 8, 64 and 1024 GPUs, and when data parallelism sends less.

    python -m benchmarks.scaling         # prints the tables of docs/scaling.md

Nothing is measured: the bytes are those of the formulas in `smoe.parallel.wire`, the speeds those of the links. A
machine has 8 GPUs; tokens are bfloat16, gradients float32. Each GPU sends `NVLINK` bytes per second within its machine
and `NIC` bytes per second to other machines, both at once, so the slower transfer counts. All-reduces are hierarchical,
as NCCL does them with one network card per GPU: for S bytes, 2 S 7/8 within the machine and 2 (n - 1)/n S/8 between n
machines. The latency of a message (10 to 20 us) is not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from smoe.parallel.wire import WireBytes, all_reduce_bytes, wire_bytes

NVLINK = 450e9  # bytes per second, direction and GPU: NVLink 4 (18 links of 25 GB/s)
NIC = 50e9  # bytes per second, direction and GPU: InfiniBand NDR, 400 Gbit/s
FLOPS = 400e12  # FLOP per second and GPU: assumes 40 % of an H100's 989e12 in bfloat16
MACHINE = 8  # GPUs


@dataclass(frozen=True)
class Model:
    """A model of the paper: d, h and n (N) of its SMoE layers; tokens per GPU, an eighth of the paper's batch."""

    name: str
    layers: int
    d: int
    h: int
    tokens: int
    bias: bool = True
    n: int = 16


MODELS = (
    Model("Transformer-XL", 4, 256, 512, 22 * 512 // 8),
    Model("BERT", 12, 768, 384, 64 * 512 // 8),
    Model("RoBERTa", 12, 768, 192, 64 * 512 // 8),
)


def seconds(model: Model, scheme: str, world: int, expert_parallel: int, k: int) -> float:
    """Seconds that one layer's messages take per step.

    Args:
        scheme: ``data_parallel``, ``fastmoe`` or ``ours``.
        world, expert_parallel: W and E, the ranks and those among them that share the experts.
    """
    if scheme == "data_parallel":
        return _all_reduce(_bytes(model, 1, k).data_parallel, world, MACHINE)
    moved = getattr(_bytes(model, expert_parallel, k), scheme)
    # Of the other E - 1 ranks, those outside the machine are reached through the network card.
    beyond = max(expert_parallel - MACHINE, 0) / (expert_parallel - 1)
    exchange = max(moved * (1 - beyond) / NVLINK, moved * beyond / NIC)
    gradients = _bytes(model, 1, k).data_parallel / expert_parallel
    return exchange + _all_reduce(gradients, world // expert_parallel, max(MACHINE // expert_parallel, 1))


def _bytes(model: Model, expert_parallel: int, k: int) -> WireBytes:
    """With E = W; for E = 1, ``data_parallel`` is the size of the gradients, which a ring of two ranks sends."""
    world = 2 if expert_parallel == 1 else expert_parallel
    return wire_bytes(model.tokens, model.d, k, model.n, world, d_expert=model.h, itemsize=2, bias=model.bias)


def _all_reduce(size: float, ranks: int, within: int) -> float:
    """Seconds for an all-reduce of ``size`` bytes over ``ranks`` ranks, ``within`` of them in each machine."""
    within = min(within, ranks)
    return max(
        all_reduce_bytes(size, within) / NVLINK,
        all_reduce_bytes(size / within, ranks // within) / NIC,
    )


def compute_seconds(model: Model, k: int) -> float:
    """Seconds for the matrix products of a layer's experts, forward and backward."""
    return 12 * model.tokens * k * model.h * model.d / FLOPS


def break_even(model: Model, world: int, k: int) -> float:
    """Tokens per rank below which expert parallelism over all ``world`` ranks sends less than data parallelism."""
    per_token = (_ours(model, world, k, 1 << 20) - _ours(model, world, k, 0)) / (1 << 20)
    return (all_reduce_bytes(_bytes(model, 1, k).data_parallel, world) - _ours(model, world, k, 0)) / per_token


def _ours(model: Model, world: int, k: int, tokens: int) -> float:
    return wire_bytes(tokens, model.d, k, model.n, world, d_expert=model.h, itemsize=2, bias=model.bias).ours


def time_table() -> str:
    """Markdown: microseconds per layer and step."""
    lines = [
        "| model (tokens per GPU) | GPUs | k | experts' arithmetic | data parallel | a copy per expert, E = 8 "
        "| ours, E = 8 | ours, E = 16 |\n|---|---|---|---|---|---|---|---|"
    ]
    for model in MODELS:
        for world in (8, 64, 1024):
            for k in (8, 16):
                cells = [compute_seconds(model, k), seconds(model, "data_parallel", world, 1, k)]
                cells += [seconds(model, scheme, world, 8, k) for scheme in ("fastmoe", "ours")]
                cells += [seconds(model, "ours", world, 16, k)] if world >= 16 else []
                texts = [f"{1e6 * cell:.0f}" for cell in cells] + ["-"] * (5 - len(cells))
                lines.append(f"| {model.name} ({model.tokens}) | {world} | {k} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def break_even_table() -> str:
    """Markdown: the break-even point in tokens per GPU."""
    lines = ["| model | tokens per GPU on 8 | k | E = 2 | E = 4 | E = 8 | E = 16 |\n|---|---|---|---|---|---|---|"]
    for model in MODELS:
        for k in (2, 8, 16):
            cells = " | ".join(f"{break_even(model, world, k):,.0f}" for world in (2, 4, 8, 16))
            lines.append(f"| {model.name} | {model.tokens} | {k} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print("Microseconds per layer and step\n\n" + time_table())
    print("Tokens per GPU below which expert parallelism sends less than data parallelism\n\n" + break_even_table())
