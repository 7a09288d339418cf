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

# Weights of one expert's matrix up to which `dense` is taken on a GPU, where that is not measured, and in compiled
# graphs, whose number of tokens may be open.
TINY_EXPERT = 1 << 14

# What `grouped` and `dense` do on a CPU beside the products of the chosen experts, as the multiply-adds that take as
# long. `python -m benchmarks.paths` measures how well the faster one is chosen; benchmarks/LOG.md says what it found.
ROW = 55  # `grouped`, per pair and number of a row: gathering it and adding up what the experts made of it
START = 10_000_000  # `grouped`, per expert: starting its products
UNIT = 256  # `dense`, per token and hidden unit that it computes in vain, beside its d multiply-adds
# Products in bf16 take less time with AMX, so that all else counts more. From one shape: `dense` was ahead at 12 of 16
# experts of 192 units. Asked once, since torch.compile can't trace the question.
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
    all_experts = routing.indices.shape[1] == experts.num_experts and not routing.absent
    if all_experts or dense_pays(x, experts, routing):
        return PATHS["dense"]
    return PATHS["grouped_mm" if grouped_mm.usable(x, experts) else "grouped"]


def dense_pays(x: Tensor, experts: Experts, routing: Routing) -> bool:
    """Whether all experts for all tokens of x (T, d) take less time than the experts that each token has chosen."""
    d, h, num_tokens = experts.d_model, experts.d_expert, x.shape[0]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return d * h <= TINY_EXPERT
    if num_tokens <= few.MOST_TOKENS and few.possible(x, experts):
        return False  # `few` has a rule of its own for when `grouped` is faster
    pairs = int((routing.indices >= 0).sum()) if routing.absent else routing.indices.numel()
    superfluous = (num_tokens * experts.num_experts - pairs) * h * (d + UNIT)
    factor = BF16_FACTOR if product_dtype(x) == torch.bfloat16 else 1
    return superfluous <= factor * (pairs * d * ROW + experts.num_experts * START)


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
