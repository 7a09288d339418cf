"""The fast paths as operators that torch.compile takes into its graph whole, instead of breaking the graph at them.

A graph needs sizes that don't depend on the routing, so what forward keeps for backward comes as one tensor of the
largest size that it can have: (k * T + N * padding, h). Filling it is one copy of the hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import ACTIVATIONS
from . import fused


def capacity(x: Tensor, weights: Tensor, indices: Tensor | None, merge: int, up: Tensor, gated: bool) -> tuple:
    """The shape of the tensor that holds all that is kept."""
    num_experts, h = up.shape[0], up.shape[1]
    rows = weights.numel() // merge
    if indices is not None:
        rows = rows + num_experts * fused.multiple_of(x, weights.numel(), num_experts)
    return (rows * (2 if gated else 1), merge * h)


@torch.library.custom_op("smoe::experts", mutates_args=())
def experts_op(
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    merge: int,
    activation: str,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    parameters = [None if p is None else p.to(x.dtype) for p in (up, up_bias, gate, gate_bias, down, down_bias)]
    y, saved = fused.forward(x, weights.to(x.dtype), indices, merge, ACTIVATIONS[activation], parameters, True)
    kept = x.new_empty(capacity(x, weights, indices, merge, up, gate is not None))
    if saved:
        torch.cat(saved, out=kept[: sum(s.shape[0] for s in saved)])
    return y, kept


@experts_op.register_fake
def _(x, weights, indices, merge, activation, up, up_bias, gate, gate_bias, down, down_bias):
    return torch.empty_like(x), x.new_empty(capacity(x, weights, indices, merge, up, gate is not None))


@torch.library.custom_op("smoe::experts_backward", mutates_args=())
def experts_backward_op(
    grad_y: Tensor,
    kept: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    merge: int,
    activation: str,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    need_weights: bool,
) -> list[Tensor]:
    originals = (up, up_bias, gate, gate_bias, down, down_bias)
    cast = [None if p is None else p.to(x.dtype) for p in originals]
    dtypes = [None if p is None else p.dtype for p in originals]
    saved = []
    if x.shape[0]:
        plan = fused.make_plan(x, indices, up.shape[0], merge)
        sizes = [end - start for start, end in plan.spans] * (1 if gate is None else 2)
        saved = list(kept[: sum(sizes)].split(sizes))
    grad_x, grad_weights, grads = fused.backward(
        grad_y.contiguous(), x, weights.to(x.dtype), indices, merge, ACTIVATIONS[activation], cast, saved,
        need_weights, dtypes,
    )  # fmt: skip
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights.to(weights.dtype)
    return [grad_x, grad_weights, *(g for g in grads if g is not None)]


@experts_backward_op.register_fake
def _(
    grad_y, kept, x, weights, indices, merge, activation, up, up_bias, gate, gate_bias, down, down_bias, need_weights
):
    present = [p for p in (up, up_bias, gate, gate_bias, down, down_bias) if p is not None]
    return [torch.empty_like(x), torch.empty_like(weights), *(torch.empty_like(p) for p in present)]


def _setup(ctx, inputs, output):
    x, weights, indices, merge, activation, *parameters = inputs
    ctx.save_for_backward(output[1], x, weights, indices, *parameters)
    ctx.merge, ctx.activation = merge, activation


def _backward(ctx, grad_y, grad_kept):
    kept, x, weights, indices, *parameters = ctx.saved_tensors
    grads = experts_backward_op(
        grad_y, kept, x, weights, indices, ctx.merge, ctx.activation, *parameters, ctx.needs_input_grad[1]
    )
    grad_x, grad_weights, *rest = grads
    rest = iter(rest)
    return grad_x, grad_weights, None, None, None, *(None if p is None else next(rest) for p in parameters)


experts_op.register_autograd(_backward, setup_context=_setup)
