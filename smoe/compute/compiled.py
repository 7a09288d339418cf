"""The fast paths as operators that torch.compile takes into its graph as a whole, instead of breaking the graph.

The sizes in a graph must not depend on the routing, so what forward saves for backward is one tensor of the largest
size that it can have. Filling it is one copy of the hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import ACTIVATIONS
from .fast_path import FAST_PATHS, Inputs, Parameters, each, run_backward, run_forward
from .grouping import most_padding


def most_saved(x: Tensor, weights: Tensor, indices: Tensor | None, keep: bool, up: Tensor, gated: bool) -> int:
    """The most elements that forward can save."""
    if not keep:
        return 0
    pairs, (num_experts, h) = weights.numel(), up.shape[:2]
    if indices is not None:
        pairs = pairs + num_experts * most_padding(x, pairs, num_experts)
    return pairs * h * (2 if gated else 1)


@torch.library.custom_op("smoe::experts", mutates_args=())
def experts_op(
    path: str,
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
    parameters = Parameters(up, up_bias, gate, gate_bias, down, down_bias)
    y, saved = run_forward(path, Inputs(x, weights, indices, ACTIVATIONS[activation], parameters), keep)
    kept = x.new_empty(most_saved(x, weights, indices, keep, up, gate is not None))
    if saved:
        torch.cat([s.view(-1) for s in saved], out=kept[: sum(s.numel() for s in saved)])
    return y, kept


@experts_op.register_fake
def _(path, x, weights, indices, activation, keep, up, up_bias, gate, gate_bias, down, down_bias):
    return x.new_empty(x.shape), x.new_empty(most_saved(x, weights, indices, keep, up, gate is not None))


@torch.library.custom_op("smoe::experts_backward", mutates_args=())
def experts_backward_op(
    path: str,
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
    parameters = Parameters(up, up_bias, gate, gate_bias, down, down_bias)
    dtypes = each(lambda p: p.dtype, parameters)
    saved = []
    if x.shape[0]:
        shapes = FAST_PATHS[path].saved_shapes(x, indices, *up.shape[:2])
        shapes = [shape for shape in shapes for _ in range(1 if gate is None else 2)]
        sizes = [rows * width for rows, width in shapes]
        parts = kept[: sum(sizes)].split(sizes)
        saved = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    inputs = Inputs(x, weights, indices, ACTIVATIONS[activation], parameters)
    grad_x, grad_weights, grads = run_backward(path, inputs, grad_y, saved, dtypes, need_weights, False)
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights
    return [grad_x, grad_weights, *(g for g in grads if g is not None)]


@experts_backward_op.register_fake
def _(path, grad_y, kept, x, weights, indices, activation, up, up_bias, gate, gate_bias, down, down_bias, need_weights):
    present = [p for p in (up, up_bias, gate, gate_bias, down, down_bias) if p is not None]
    return [torch.empty_like(x), torch.empty_like(weights), *(p.new_empty(p.shape) for p in present)]


def _setup(ctx, inputs, output):
    ctx.path, x, weights, indices, ctx.activation, _, *parameters = inputs
    ctx.save_for_backward(output[1], x, weights, indices, *parameters)


def _backward(ctx, grad_y, grad_kept):
    kept, x, weights, indices, *parameters = ctx.saved_tensors
    grad_x, grad_weights, *rest = experts_backward_op(
        ctx.path, grad_y, kept, x, weights, indices, ctx.activation, *parameters, ctx.needs_input_grad[2]
    )
    rest = iter(rest)
    return None, grad_x, grad_weights, None, None, None, *(None if p is None else next(rest) for p in parameters)


experts_op.register_autograd(_backward, setup_context=_setup)
