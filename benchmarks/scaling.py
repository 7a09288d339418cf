"""Estimates: time of a layer's traffic on 8, 64 and 1024 GPUs, and the tokens from which data parallel sends less.

    python -m benchmarks.scaling         # the tables of docs/scaling.md

Nothing is measured: the bytes of `smoe.parallel.wire`'s formulas are divided by the speed of the links. Machines have 8
GPUs; tokens are bfloat16, gradients float32. A GPU sends `NVLINK` bytes per second within its machine and `NIC` to
others; both links work at once, so the slower one counts. All-reduces are hierarchical (as NCCL does with one network
card per GPU): of S bytes, 2 S 7/8 are sent within a machine and 2 (n - 1)/n S/8 between n machines. The latency of a
message (10 to 20 us) is not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from smoe.parallel.wire import all_reduce_bytes, wire_bytes

NVLINK = 450e9  # bytes per second and GPU, in one direction: NVLink 4 (18 links of 25 GB/s)
NIC = 50e9  # InfiniBand NDR, 400 Gbit/s, one card per GPU
FLOPS = 400e12  # of an H100 in bfloat16; an assumption, 40 % of its 989 TFLOP/s
MACHINE = 8


@dataclass(frozen=True)
class Model:
    """A model of the paper. tokens: per GPU, an eighth of the paper's batch; so the batch grows with the GPUs."""

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


def seconds(model: Model, scheme: str, world: int, spread: int, k: int) -> float:
    """Per layer and step; scheme ``data_parallel``, ``fastmoe`` or ``ours``, with experts over ``spread`` ranks."""
    if scheme == "data_parallel":
        return _all_reduce(_bytes(model, 1, k).data_parallel, world, MACHINE)
    moved = getattr(_bytes(model, spread, k), scheme)
    # The share of a rank's spread - 1 partners that is on other machines, reached through the network card.
    beyond = max(spread - MACHINE, 0) / (spread - 1)
    exchange = max(moved * (1 - beyond) / NVLINK, moved * beyond / NIC)
    gradients = _bytes(model, 1, k).data_parallel / spread
    return exchange + _all_reduce(gradients, world // spread, max(MACHINE // spread, 1))


def _bytes(model: Model, spread: int, k: int):
    """With spread = 1, ``data_parallel`` is the size of the gradients."""
    world = 2 if spread == 1 else spread  # over two ranks a ring sends the size of the gradients
    return wire_bytes(model.tokens, model.d, k, model.n, world, d_expert=model.h, itemsize=2, bias=model.bias)


def _all_reduce(size: float, ranks: int, within: int) -> float:
    """Seconds of an all-reduce of ``size`` bytes among ``ranks``, with ``within`` of them per machine."""
    within = min(within, ranks)
    return max(
        all_reduce_bytes(size, within) / NVLINK,
        all_reduce_bytes(size / within, ranks // within) / NIC,
    )


def compute_seconds(model: Model, k: int) -> float:
    """Seconds of the matrix products of the experts, forward and backward, per layer and step."""
    return 12 * model.tokens * k * model.h * model.d / FLOPS


def break_even(model: Model, spread: int, k: int) -> float:
    """Tokens per rank below which ours sends less than data parallel, with the experts over all ``spread`` ranks."""
    per_token = (_ours(model, spread, k, 1 << 20) - _ours(model, spread, k, 0)) / (1 << 20)
    return (all_reduce_bytes(_bytes(model, 1, k).data_parallel, spread) - _ours(model, spread, k, 0)) / per_token


def _ours(model: Model, spread: int, k: int, tokens: int) -> float:
    return wire_bytes(tokens, model.d, k, model.n, spread, d_expert=model.h, itemsize=2, bias=model.bias).ours


def time_table() -> str:
    """Microseconds per layer and step."""
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
    """Tokens per GPU."""
    lines = ["| model | tokens per GPU on 8 | k | E = 2 | E = 4 | E = 8 | E = 16 |\n|---|---|---|---|---|---|---|"]
    for model in MODELS:
        for k in (2, 8, 16):
            cells = " | ".join(f"{break_even(model, spread, k):,.0f}" for spread in (2, 4, 8, 16))
            lines.append(f"| {model.name} | {model.tokens} | {k} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print("Microseconds per layer and step\n\n" + time_table())
    print("Tokens per GPU below which expert parallel sends less than data parallel\n\n" + break_even_table())
