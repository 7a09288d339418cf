"""The fast paths as operators that torch.compile takes into its graph whole, instead of breaking the graph at them.

A graph needs sizes that don't depend on the routing, so what forward keeps for backward comes as one tensor of the
largest size that it can have. Filling it is one copy of the hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import ACTIVATIONS


def _kernel(indices: Tensor | None):
    from . import dense, grouped

    return dense.KERNEL if indices is None else grouped.KERNEL


def capacity(x: Tensor, weights: Tensor, indices: Tensor | None, keep: bool, up: Tensor, gated: bool) -> int:
    """The most elements that all that is kept can have."""
    from .grouped import most_padding

    if not keep:
        return 0
    pairs, (num_experts, h) = weights.numel(), up.shape[:2]
    if indices is not None:
        pairs = pairs + num_experts * most_padding(x, pairs, num_experts)
    return pairs * h * (2 if gated else 1)


@torch.library.custom_op("smoe::experts", mutates_args=())
def experts_op(
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    activation: str,
    keep: bool,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    parameters = [None if p is None else p.to(x.dtype) for p in (up, up_bias, gate, gate_bias, down, down_bias)]
    y, saved = _kernel(indices).forward(x, weights.to(x.dtype), indices, ACTIVATIONS[activation], parameters, keep)
    kept = x.new_empty(capacity(x, weights, indices, keep, up, gate is not None))
    if saved:
        torch.cat([s.view(-1) for s in saved], out=kept[: sum(s.numel() for s in saved)])
    return y, kept


@experts_op.register_fake
def _(x, weights, indices, activation, keep, up, up_bias, gate, gate_bias, down, down_bias):
    return x.new_empty(x.shape), x.new_empty(capacity(x, weights, indices, keep, up, gate is not None))


@torch.library.custom_op("smoe::experts_backward", mutates_args=())
def experts_backward_op(
    grad_y: Tensor,
    kept: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
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
        shapes = _kernel(indices).shapes(x, indices, *up.shape[:2]) * (1 if gate is None else 2)
        sizes = [rows * width for rows, width in shapes]
        parts = kept[: sum(sizes)].split(sizes)
        saved = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    grad_x, grad_weights, grads = _kernel(indices).backward(
        grad_y.contiguous(), x, weights.to(x.dtype), indices, ACTIVATIONS[activation], cast, saved,
        need_weights, dtypes, False,
    )  # fmt: skip
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights.to(weights.dtype)
    return [grad_x, grad_weights, *(g for g in grads if g is not None)]


@experts_backward_op.register_fake
def _(grad_y, kept, x, weights, indices, activation, up, up_bias, gate, gate_bias, down, down_bias, need_weights):
    present = [p for p in (up, up_bias, gate, gate_bias, down, down_bias) if p is not None]
    return [torch.empty_like(x), torch.empty_like(weights), *(p.new_empty(p.shape) for p in present)]


def _setup(ctx, inputs, output):
    x, weights, indices, activation, _, *parameters = inputs
    ctx.save_for_backward(output[1], x, weights, indices, *parameters)
    ctx.activation = activation


def _backward(ctx, grad_y, grad_kept):
    kept, x, weights, indices, *parameters = ctx.saved_tensors
    grads = experts_backward_op(grad_y, kept, x, weights, indices, ctx.activation, *parameters, ctx.needs_input_grad[1])
    grad_x, grad_weights, *rest = grads
    rest = iter(rest)
    return grad_x, grad_weights, None, None, None, *(None if p is None else next(rest) for p in parameters)


experts_op.register_autograd(_backward, setup_context=_setup)
