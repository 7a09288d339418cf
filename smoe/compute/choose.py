"""Which path computes the experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from . import dense, few, grouped, grouped_mm, int8, plain, reference

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

# Up to this many weights, the matrix products of one expert cost more to start than to compute: at 64 x 128 weights and
# 1024 tokens a training step took 0.38 s with `grouped` at k = 8 and 0.22 s with `dense`.
TINY_EXPERT = 1 << 14


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
    if all_experts or experts.d_model * experts.d_expert <= TINY_EXPERT:
        return PATHS["dense"]
    return PATHS["grouped_mm" if grouped_mm.usable(x, experts) else "grouped"]


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
