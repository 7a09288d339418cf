"""Which path computes the experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from . import dense, few, grouped, grouped_mm, int8, plain, reference
from .products import product_dtype

ComputePath = Callable[[Tensor, Experts, Routing], Tensor]

PATHS: dict[str, ComputePath] = {
    "reference": reference.compute,
    "plain": plain.compute,
    "grouped": grouped.compute,
    "dense": dense.compute,
    "few": few.compute,
    "grouped_mm": grouped_mm.compute,
}
# Not by name: it computes quantised experts, and nothing else does.
INT8: ComputePath = int8.compute

# Up to this many weights, the matrix products of one expert cost more to start than to compute, on a GPU.
TINY_EXPERT = 1 << 14

# What `grouped` does on a CPU beside its products, in the multiply-adds that take as long: for each number of a row
# that it gathers and sums again, for each expert that it starts products for, and what `dense` does beside its own for
# each hidden unit. Fitted to 367 forward and training passes on one core of a Zen 5 in bf16 and float32, 64 to 8192
# tokens, 4 to 64 experts of 16 to 512 units; on 78 others the path that they choose takes 1.003 of the faster one's
# time on average, and 1.21 at most.
ROW = 55
START = 10_000_000
UNIT = 256
# Where AMX multiplies in bf16, all else counts twice: `benchmarks/LOG.md` has `dense` ahead at 12 of 16 experts of 192
# units there. Asked once, since torch.compile can't trace the question.
BF16_FACTOR = 2 if torch.cpu._is_amx_tile_supported() else 1


def choose(name: str, x: Tensor, experts: Experts, routing: Routing) -> ComputePath:
    """The path called ``name``; for ``auto`` the fastest one known for this input.

    Under the transforms of ``torch.func``, under ``torch.jit.trace`` and in ``torch.export`` (and so in
    ``torch.onnx.export``) always ``plain``: it is plain autograd without operators of smoe's own, and its trace holds
    for other inputs.
    """
    if torch.compiler.is_exporting():
        return PATHS["plain"]
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            _refuse_vmap()
            return PATHS["plain"]
        if torch.jit.is_tracing():
            return PATHS["plain"]
    if experts.int8:
        return INT8
    if name != "auto":
        return PATHS[name]
    if few.usable(x, experts, routing):
        return PATHS["few"]
    k = routing.indices.shape[1]
    all_experts = k == experts.num_experts and not routing.absent
    if all_experts or dense_pays(x, k, experts):
        return PATHS["dense"]
    return PATHS["grouped_mm" if grouped_mm.usable(x, experts) else "grouped"]


def dense_pays(x: Tensor, k: int, experts: Experts) -> bool:
    """Whether all experts for all tokens of x (T, d) take less time than the k that each has chosen."""
    d, h, num_experts = experts.d_model, experts.d_expert, experts.num_experts
    if x.device.type != "cpu":
        return d * h <= TINY_EXPERT
    superfluous = (num_experts - k) * h * (d + UNIT)  # of one token
    factor = BF16_FACTOR if product_dtype(x) == torch.bfloat16 else 1
    # A second thread halves the products, not the starts. A compiled graph is for any number of tokens.
    starts = 0 if torch.compiler.is_compiling() else num_experts * START * torch.get_num_threads()
    return x.shape[0] * (superfluous - factor * k * d * ROW) <= factor * starts


def _refuse_vmap() -> None:
    """A ValueError if vmap is among the active transforms of ``torch.func``."""
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack()]
    if torch._C._functorch.TransformType.Vmap in kinds:
        raise ValueError(
            "torch.func.vmap over an SMoE layer can't work, since every sample has other tokens per expert; pass all "
            "samples at once, x (samples, ..., d_model), and for per-sample gradients call torch.func.grad per sample"
        )


def check_compute(name: str) -> str:
    """name itself if it is ``auto`` or one of ``PATHS``, else a ValueError that lists them."""
    if name != "auto" and name not in PATHS:
        raise ValueError(f"compute is {name!r}; it must be auto or one of {', '.join(PATHS)}")
    return name
