"""Dense: every token visits all experts, with weight 0 where it has not chosen them. No rows are gathered.

All experts with weights are one dense MLP whose hidden units are scaled. At k = N that is all there is to compute;
below, the superfluous arithmetic is cheaper than gathering where k is near N or experts are tiny.

What makes it faster than the dense MLP of PyTorch: temporaries are blocks that stay in the cache and are used again, so
that no fresh pages have to be fetched from the system; the gradient of the hidden units takes the place of what was
kept of them; and nothing else of that size is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..experts import Experts
from ..router import Routing
from .function import Kernel, empty_gradients, run
from .hidden import activated, kept_units, may_fuse_relu, pre_gradients
from .plan import dense_weights
from .products import group_dots, mm_into, scale_

# Bytes of a block of hidden units: all tokens by the units of some experts side by side.
BLOCK_BYTES = 4 << 20
# Bytes of the hidden units of some tokens, of all experts.
ROWS_BYTES = 8 << 20


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``. Not differentiable twice."""
    # Scattered also at k = N: a custom router's indices need not be in the order of the experts.
    weights = dense_weights(routing.weights, routing.indices, experts.num_experts, routing.absent)
    return run(KERNEL, x, weights, None, experts)


def forward(
    x: Tensor,
    weights: Tensor,
    indices: None,
    activation: Activation,
    parameters: list[Tensor | None],
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """y (T, d), and (if ``keep``) ``kept_units``, one tensor a block; gated: all those of up, then of gate."""
    num_tokens, num_experts = weights.shape
    h, down_bias = parameters[0].shape[1], parameters[5]
    up, up_bias, gate, gate_bias, down = (None if p is None else p.flatten(0, 1) for p in parameters[:5])
    y = x.new_empty(x.shape)
    if num_tokens == 0:
        return y, []
    fuse = may_fuse_relu(x, num_tokens * num_experts * h, parameters, activation)

    def units(rows: Tensor, block: slice) -> list[Tensor]:
        parts = (None if p is None else p[block] for p in (up, up_bias, gate, gate_bias))
        return kept_units(rows, *parts, activation, fuse)

    blocks = _blocks(x, num_experts, h)
    kept = [units(x, units_of(block, h)) for block in blocks] if keep else []
    edges = _row_edges(x, num_experts * h)
    buffer = x.new_empty(edges[1], num_experts * h)
    hidden = x.new_empty(edges[1] * blocks[0].stop * h)
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        for i, block in enumerate(blocks):
            cols = units_of(block, h)
            here = [s[first:end] for s in kept[i]] if keep else units(x[first:end], cols)
            # Not straight into the buffer's columns: PyTorch's GELU takes no notice of an output's strides.
            out = hidden[: here[0].numel()].view(here[0].shape)
            scale_(activated(here, activation, out), weights[first:end, block], buffer[: end - first, cols])
        mm_into(y[first:end], buffer[: end - first], down)
    if down_bias is not None:
        y.addmm_(weights, down_bias)
    return y, [s for part in zip(*kept, strict=True) for s in part]


def backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: None,
    activation: Activation,
    parameters: list[Tensor | None],
    saved: list[Tensor],
    need_weights: bool,
    dtypes: list[torch.dtype | None],
    reuse: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """See ``Kernel``. Experts are worked off in blocks of several, all tokens at once."""
    num_tokens, num_experts = weights.shape
    grads = empty_gradients(parameters, dtypes, zero=num_tokens == 0)
    grad_x = torch.empty_like(x)
    grad_weights = torch.empty_like(weights) if need_weights else None
    if num_tokens == 0:
        return grad_x, grad_weights, grads
    h, down_bias = parameters[0].shape[1], parameters[5]
    up, gate, down = (None if p is None else p.flatten(0, 1) for p in (parameters[0], parameters[2], parameters[4]))
    g_up, g_up_bias, g_gate, g_gate_bias, g_down = (None if g is None else g.flatten(0, 1) for g in grads[:5])
    blocks = _blocks(x, num_experts, h)
    grad_pre = saved if reuse else [torch.empty_like(s) for s in saved]
    buffers = [x.new_empty(num_tokens * (blocks[0].stop * h)) for _ in range(3 if gate is not None else 2)]
    for i, block in enumerate(blocks):
        cols, w, mine = units_of(block, h), weights[:, block], slice(i, None, len(blocks))
        kept, grads_here = saved[mine], grad_pre[mine]
        grad_hidden, hidden, *more = (b[: num_tokens * (cols.stop - cols.start)].view(num_tokens, -1) for b in buffers)
        mm_into(grad_hidden, grad_y, down[cols].t())
        scaled = hidden
        if need_weights or g_down is not None:
            hidden = activated(kept, activation, hidden)
        if need_weights:
            group_dots(grad_hidden, hidden, w.shape[1], grad_weights[:, block])
        if g_down is not None:
            mm_into(g_down[cols], scale_(hidden, w, scaled).t(), grad_y)
        scale_(grad_hidden, w, grad_hidden)
        pre_gradients(grad_hidden, kept, activation, grads_here, [scaled, *more])
        for grad, g_weight, g_bias in zip(grads_here, (g_up, g_gate), (g_up_bias, g_gate_bias), strict=False):
            if g_weight is not None:
                mm_into(g_weight[cols], grad.t(), x)
            if g_bias is not None:
                g_bias[cols] = grad.sum(0)
    del buffers
    edges = _row_edges(x, num_experts * h)
    buffer = x.new_empty(edges[1], num_experts * h)
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        side_by_side = buffer[: end - first]
        torch.cat([g[first:end] for g in grad_pre[: len(blocks)]], 1, out=side_by_side)
        mm_into(grad_x[first:end], side_by_side, up)
        if gate is not None:
            torch.cat([g[first:end] for g in grad_pre[len(blocks) :]], 1, out=side_by_side)
            grad_x[first:end].addmm_(side_by_side, gate)
    if down_bias is not None:
        if grads[5] is not None:
            mm_into(grads[5], weights.t(), grad_y)
        if need_weights:
            grad_weights.addmm_(grad_y, down_bias.t())
    return grad_x, grad_weights, grads


def shapes(x: Tensor, indices: None, num_experts: int, h: int) -> list[tuple[int, int]]:
    """See ``Kernel``."""
    return [(x.shape[0], (block.stop - block.start) * h) for block in _blocks(x, num_experts, h)]


KERNEL = Kernel(forward, backward, shapes)


def units_of(experts: slice, h: int) -> slice:
    """The hidden units of some experts, of all H."""
    return slice(experts.start * h, experts.stop * h)


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
