"""Dense: every token goes through all experts, with weight 0 where it has not chosen them. No rows are gathered.

All experts with weights are one dense MLP whose hidden units are scaled. At k = N nothing else has to be computed;
below, the extra arithmetic is cheaper than gathering where k is near N, experts are small or tokens few.

It is faster than PyTorch's dense MLP because temporaries are blocks that stay in the cache and are used again, so that
no fresh pages have to be fetched from the system; because the gradient of the hidden units takes the place of what was
kept of them; and because nothing else of that size is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from .fast_path import FAST_PATHS, FastPath, Inputs, Parameters, each
from .function import run
from .hidden import activated, flatten, kept_units, linear_gradients, may_fuse_relu, room_for_gradients, unflatten
from .products import group_dots, mm_into, scale_

# Bytes of a block of hidden units: those of some experts, side by side, for all tokens.
BLOCK_BYTES = 4 << 20
# Bytes of the hidden units of all experts for some tokens.
ROWS_BYTES = 8 << 20


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``. Not differentiable twice."""
    # Also at k = N: a custom router's indices need not be in the order of the experts.
    weights = dense_weights(routing.weights, routing.indices, experts.num_experts, routing.absent)
    return run("dense", x, weights, None, experts)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """See ``FastPath``. What is saved is one ``Kept`` per block of experts."""
    x, weights, _, activation, parameters, _ = inputs
    (num_tokens, num_experts), h = weights.shape, parameters.up.shape[1]
    mlp = _side_by_side(parameters)
    fuse = may_fuse_relu(x, num_tokens * num_experts * h, parameters, activation)
    blocks = _blocks(x, num_experts, h)
    edges = _row_edges(x, num_experts * h)
    # With dropout also without `keep`: checkpointing runs forward both ways, and both must draw the same masks.
    at_once = keep or inputs.dropout > 0
    kept = [kept_units(x, _units(mlp, block, h), inputs, fuse) for block in blocks] if at_once else []
    y = x.new_empty(x.shape)
    scaled = x.new_empty(edges[1], num_experts * h)
    block_buffer = x.new_empty(edges[1] * blocks[0].stop * h)
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        rows = slice(first, end)
        for i, block in enumerate(blocks):
            here = kept[i].rows(rows) if at_once else kept_units(x[rows], _units(mlp, block, h), inputs, fuse)
            # Not straight into the columns of `scaled`: PyTorch's GELU ignores the strides of its output.
            hidden = activated(here, activation, block_buffer[: here.up.numel()].view(here.up.shape))
            scale_(hidden, weights[rows, block], scaled[: end - first, _hidden_of(block, h)])
        mm_into(y[rows], scaled[: end - first], mlp.down)
    if mlp.down_bias is not None:
        y.addmm_(weights, mlp.down_bias)
    return y, flatten(kept) if keep else []


def backward(
    inputs: Inputs, grad_y: Tensor, saved: list[Tensor], grads: Parameters, need_weights: bool, reuse: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``FastPath``. The gradients of the parameters block after block, for all tokens; then that of x."""
    x, weights, _, activation, parameters, _ = inputs
    (num_tokens, num_experts), h = weights.shape, parameters.up.shape[1]
    mlp, grads = _side_by_side(parameters), _side_by_side(grads)
    gated = mlp.gate is not None
    grad_x = torch.empty_like(x)
    grad_weights = torch.empty_like(weights) if need_weights else None
    blocks, kept = _blocks(x, num_experts, h), unflatten(saved, inputs)
    grads_linear = room_for_gradients(kept, reuse)
    buffers = [x.new_empty(num_tokens * (blocks[0].stop * h)) for _ in range(3 if gated else 2)]
    for block, units, grad_linear in zip(blocks, kept, grads_linear, strict=True):
        block_weights, block_grads = weights[:, block], _units(grads, block, h)
        grad_hidden, spare, *spares = (b[: units.up.numel()].view(units.up.shape) for b in buffers)
        mm_into(grad_hidden, grad_y, mlp.down[_hidden_of(block, h)].t())
        if need_weights or grads.down is not None:
            hidden = activated(units, activation, spare)
        if need_weights:
            group_dots(grad_hidden, hidden, block_weights.shape[1], grad_weights[:, block])
        if grads.down is not None:
            mm_into(block_grads.down, scale_(hidden, block_weights, spare).t(), grad_y)
        scale_(grad_hidden, block_weights, grad_hidden)
        linear_gradients(grad_hidden, units, activation, grad_linear, [spare, *spares])
        for grad, grad_weight, grad_bias in (
            (grad_linear.up, block_grads.up, block_grads.up_bias),
            (grad_linear.gate, block_grads.gate, block_grads.gate_bias),
        ):
            if grad_weight is not None:
                mm_into(grad_weight, grad.t(), x)
            if grad_bias is not None:
                grad_bias.copy_(grad.sum(0))
    del buffers
    edges = _row_edges(x, num_experts * h)
    buffer = x.new_empty(edges[1], num_experts * h)
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        side_by_side = buffer[: end - first]
        torch.cat([grad.up[first:end] for grad in grads_linear], 1, out=side_by_side)
        mm_into(grad_x[first:end], side_by_side, mlp.up)
        if gated:
            torch.cat([grad.gate[first:end] for grad in grads_linear], 1, out=side_by_side)
            grad_x[first:end].addmm_(side_by_side, mlp.gate)
    if grads.down_bias is not None:
        mm_into(grads.down_bias, weights.t(), grad_y)
    if need_weights and mlp.down_bias is not None:
        grad_weights.addmm_(grad_y, mlp.down_bias.t())
    return grad_x, grad_weights


def saved_shapes(x: Tensor, indices: None, num_experts: int, h: int) -> list[tuple[int, int]]:
    """See ``FastPath``."""
    return [(x.shape[0], (block.stop - block.start) * h) for block in _blocks(x, num_experts, h)]


FAST_PATHS["dense"] = FastPath(forward, backward, saved_shapes)


def dense_weights(weights: Tensor, indices: Tensor, num_experts: int, absent: bool) -> Tensor:
    """(T, N): the weight of every expert for every token, 0 where it isn't chosen; ``absent`` as in ``Routing``."""
    zeros = weights.new_zeros(weights.shape[0], num_experts)
    if not absent:
        return zeros.scatter(1, indices, weights)
    empty = indices < 0
    # Added, because an empty slot's 0 must not overwrite the weight of the expert whose number it gets.
    return zeros.scatter_add(1, indices.masked_fill(empty, 0), weights.masked_fill(empty, 0))


def _side_by_side(parameters: Parameters) -> Parameters:
    """All experts as one dense MLP: (N, h, d) -> (H, d), (N, h) -> (H,); down_bias stays (N, d)."""
    return each(lambda p: p.flatten(0, 1), parameters)._replace(down_bias=parameters.down_bias)


def _hidden_of(block: slice, h: int) -> slice:
    """The hidden units of a block of experts, among all H."""
    return slice(block.start * h, block.stop * h)


def _units(mlp: Parameters, block: slice, h: int) -> Parameters:
    """What belongs to the hidden units of a block, without down_bias."""
    return each(lambda p: p[_hidden_of(block, h)], mlp._replace(down_bias=None))


def _blocks(x: Tensor, num_experts: int, h: int) -> list[slice]:
    """Experts in blocks of about ``BLOCK_BYTES``, at least two, so that temporaries stay below what is kept.

    All at once where there is no cache to fit into: on a GPU.
    """
    if x.device.type != "cpu":
        return [slice(0, num_experts)]
    most = BLOCK_BYTES // (x.shape[0] * h * x.element_size())
    edges = _edges(num_experts, min(most, -(-num_experts // 2)))
    return [slice(first, end) for first, end in zip(edges[:-1], edges[1:], strict=True)]


def _row_edges(x: Tensor, d_hidden: int) -> list[int]:
    """Tokens in blocks of about ``ROWS_BYTES`` of hidden units; all at once on a GPU."""
    num_tokens = x.shape[0]
    most = ROWS_BYTES // (d_hidden * x.element_size()) if x.device.type == "cpu" else num_tokens
    return _edges(num_tokens, most)


def _edges(count: int, size: int) -> list[int]:
    """0 to ``count`` in equal steps of about ``size``, at least 1."""
    steps = -(-count // max(size, 1))
    step = -(-count // steps)
    return [*range(0, count, step), count]
