"""Grouped: every expert computes the tokens that chose it, and no others. k/N of the dense MLP's arithmetic.

What makes it fast, on a CPU above all:

- the outputs of a token's experts are summed by one embedding bag, which applies the routing weights in passing;
- temporaries are one expert's or one chunk's, used again and again, so that they stay in the cache and no fresh pages
  have to be fetched from the system (for the dense MLP of PyTorch that costs as much as some of its products);
- the product with the routing weight, where it has to be made, is made on the narrower side, d or h;
- backward keeps x and one tensor of hidden units, whose gradient takes its place, and gathers rows anew; the bias of
  the second layer, its gradient, and its part in the gradient of the routing weights are one small product each for all
  experts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..activation import Activation
from ..experts import Experts
from ..router import Routing
from .function import Kernel, empty_gradients, run
from .hidden import activated, kept_units, may_fuse_relu, pre_gradients
from .plan import Plan, dense_weights, local_position, make_plan
from .products import combine, group_dots, mm_into, onednn_float32

# Bytes that the outputs of the pairs of one chunk may take: a chunk that stays in the cache is summed faster, a larger
# one makes larger products.
CHUNK_BYTES = 24 << 20
# oneDNN, which runs products of 16 bits on a CPU, and on some those of 32, compiles a kernel for every new number of
# rows: up to several milliseconds, more than the product itself takes, and routing makes new numbers at every step. So
# the rows of an expert are padded to a multiple of this, or of about 1/16 of what an expert gets if that is more: the
# numbers soon repeat, and all kernels fit into oneDNN's cache (1024 of them). It costs about 3 % of superfluous rows.
PADDING = 64
# The same where an expert gets fewer than ``PADDING`` rows: there are few numbers then anyway, and padding would cost.
FEW_PADDING = 8


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``. Not differentiable twice."""
    return run(KERNEL, x, routing.weights, routing.indices, experts)


def forward(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: Activation,
    parameters: list[Tensor | None],
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """y (T, d), and (if ``keep``) ``kept_units``, one tensor an expert; gated: all those of up, then of gate."""
    num_experts = parameters[0].shape[0]
    up, up_bias, gate, gate_bias, down, _ = (_each(p, num_experts) for p in parameters)
    y = x.new_empty(x.shape)
    if x.shape[0] == 0:
        return y, []
    plan = plan_for(x, indices, num_experts)
    weights = _without_absent(weights, plan)
    gather = _Rows(plan, x)
    fuse = may_fuse_relu(x, indices.numel() * parameters[0].shape[1], parameters, activation)
    first_layers = zip(up, up_bias, gate, gate_bias, strict=True)
    kept = [kept_units(gather(x, e), *layer, activation, fuse) for e, layer in enumerate(first_layers)]
    outputs, longest = _Outputs(plan, x), max(stop - start for c in plan.chunks for start, stop in c[2])
    buffer = x.new_empty(longest, up[0].shape[0])
    for c, (first, end, spans) in enumerate(plan.chunks):
        pairs = outputs.of(spans)
        for e, (start, stop) in enumerate(spans):
            part = slice(start - plan.spans[e][0], stop - plan.spans[e][0])
            hidden = activated([k[part] for k in kept[e]], activation, buffer[: stop - start])
            mm_into(next(pairs), hidden, down[e])
        combine(outputs.filled, local_position(plan, c, indices), weights[first:end], y[first:end])
    if parameters[5] is not None:
        y.addmm_(dense_weights(weights, indices, num_experts, plan.absent is not None), parameters[5])
    return y, ([k for ke in zip(*kept, strict=True) for k in ke] if keep else [])


def backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: Activation,
    parameters: list[Tensor | None],
    saved: list[Tensor],
    need_weights: bool,
    dtypes: list[torch.dtype | None],
    reuse: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """See ``Kernel``."""
    grads = empty_gradients(parameters, dtypes, zero=x.shape[0] == 0)
    grad_x = torch.empty_like(x)
    if x.shape[0] == 0:
        return grad_x, torch.zeros_like(weights) if need_weights else None, grads
    (num_experts, width, d), gated = parameters[0].shape, parameters[2] is not None
    up, _, gate, _, down, _ = (_each(p, num_experts) for p in parameters)
    g_up, g_up_bias, g_gate, g_gate_bias, g_down, _ = (_each(g, num_experts) for g in grads)
    plan = plan_for(x, indices, num_experts)
    weights = _without_absent(weights, plan)
    pair_weights = _by_pair(weights, plan)
    # One more, for absent slots.
    pair_grad = pair_weights.new_zeros(plan.num_pairs + 1, 1) if need_weights else None
    # Where to multiply with the routing weight. "narrow": hidden units and their gradient, after grad_weights has been
    # taken from it; else rows of x and grad_y (of grad_y alone, first thing, if grad_weights isn't asked for).
    narrow = width < d if need_weights else 2 * width < d
    late = need_weights and not narrow
    longest = max(end - start for start, end in plan.spans)
    # One buffer for both, the rows of x only when those of grad_y have done: half the cache.
    gather = _Rows(plan, x)
    buffers = [x.new_empty(longest, width) for _ in range(3 if gated else 2)]
    scaled = None if narrow else x.new_empty(longest, d)
    grad_pre = []
    for e, (start, end) in enumerate(plan.spans):
        n = end - start
        kept = [saved[e], saved[num_experts + e]] if gated else [saved[e]]
        grad_pre.append(kept if reuse else [torch.empty_like(s) for s in kept])
        if n == 0:
            for g in (g_up, g_up_bias, g_gate, g_gate_bias, g_down):
                if g[e] is not None:
                    g[e].zero_()
            continue
        ge, we = gather(grad_y, e), pair_weights[start:end]
        wg = ge if narrow else torch.mul(ge, we, out=scaled[:n])
        grad_hidden, block, *more = (b[:n] for b in buffers)
        mm_into(grad_hidden, ge if narrow or late else wg, down[e].t())
        if need_weights or g_down[e] is not None:
            hidden = activated(kept, activation, block)
        if need_weights:
            group_dots(grad_hidden, hidden, 1, pair_grad[start:end])
        if g_down[e] is not None:
            mm_into(g_down[e], torch.mul(hidden, we, out=block).t() if narrow else hidden.t(), wg)
        if narrow:
            grad_hidden.mul_(we)
        pre_gradients(grad_hidden, kept, activation, grad_pre[e], [block, *more])
        if g_up[e] is not None or g_gate[e] is not None:
            xe = gather(x, e)
            wx = torch.mul(xe, we, out=scaled[:n]) if late else xe
        for grad, g_weight, g_bias in zip(grad_pre[e], (g_up, g_gate), (g_up_bias, g_gate_bias), strict=False):
            if g_weight[e] is not None:
                mm_into(g_weight[e], grad.t(), wx)
            if g_bias[e] is not None:
                g_bias[e].copy_(torch.mm(we.t(), grad).squeeze(0) if late else grad.sum(0))
    del buffers, scaled, gather
    outputs = _Outputs(plan, x)
    # With gradients that carry no weight yet, the sum over a token's experts applies it.
    factor = weights if late else None
    for c, (first, end, spans) in enumerate(plan.chunks):
        pairs = outputs.of(spans)
        for e, (start, stop) in enumerate(spans):
            target, part = next(pairs), slice(start - plan.spans[e][0], stop - plan.spans[e][0])
            if stop > start:
                mm_into(target, grad_pre[e][0][part], up[e])
                if gated:
                    target.addmm_(grad_pre[e][1][part], gate[e])
        position = local_position(plan, c, indices)
        combine(outputs.filled, position, None if factor is None else factor[first:end], grad_x[first:end])
    grad_weights = pair_grad[plan.position.view(-1)].view(weights.shape) if need_weights else None
    down_bias = parameters[5]
    if down_bias is not None:
        if grads[5] is not None:
            mm_into(grads[5], dense_weights(weights, indices, num_experts, plan.absent is not None).t(), grad_y)
        if need_weights:
            grad_weights += (grad_y @ down_bias.t()).gather(1, indices.clamp_min(0))
    return grad_x, None if grad_weights is None else _without_absent(grad_weights, plan), grads


def shapes(x: Tensor, indices: Tensor, num_experts: int, h: int) -> list[tuple[int, int]]:
    """See ``Kernel``."""
    return [(end - start, h) for start, end in plan_for(x, indices, num_experts).spans]


KERNEL = Kernel(forward, backward, shapes)


def plan_for(x: Tensor, indices: Tensor, num_experts: int) -> Plan:
    """The plan for T > 0 tokens, in chunks of ``CHUNK_BYTES`` with padding where ``PADDING`` asks for it."""
    num_tokens, d = x.shape
    count = -(-num_tokens * indices.shape[1] * d * x.element_size() // CHUNK_BYTES)
    return make_plan(indices, num_experts, -(-num_tokens // count), row_multiple(x, indices.numel(), num_experts))


def row_multiple(x: Tensor, num_pairs: int, num_experts: int) -> int:
    """What the rows of an expert are padded to a multiple of (see ``PADDING``)."""
    most = most_padding(x, num_pairs, num_experts)
    return min(most, FEW_PADDING) if num_pairs < PADDING * num_experts else most


def most_padding(x: Tensor, num_pairs: int, num_experts: int) -> int:
    """At least ``row_multiple``, without a case for few pairs: the number of these may be a symbol of torch.compile."""
    if x.device.type == "cpu" and (x.element_size() == 2 or x.dtype == torch.float32 and onednn_float32()):
        return PADDING * max(1, num_pairs // (16 * PADDING * num_experts))
    return 1


class _Rows:
    """The rows that an expert takes, of tensors like ``x``, gathered into one buffer that the next call overwrites."""

    def __init__(self, plan: Plan, x: Tensor) -> None:
        self.plan = plan
        self.buffer = x.new_empty(max(end - start for start, end in plan.spans), x.shape[1])

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        start, end = self.plan.spans[expert]
        return torch.index_select(x, 0, self.plan.rows[start:end], out=self.buffer[: end - start])


class _Outputs:
    """The (pairs, d) outputs of one chunk after the other, expert after expert, in one buffer.

    Behind them stands a row of zeros for absent slots: a weight of 0 would not do where a pair's output is NaN.
    """

    def __init__(self, plan: Plan, x: Tensor) -> None:
        most = max(sum(stop - start for start, stop in spans) for _, _, spans in plan.chunks)
        self.buffer = x.new_empty(most + 1, x.shape[1])

    def of(self, spans: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Where each expert's outputs of a chunk go; ``filled`` are all of them, and the zeros."""
        sizes = [stop - start for start, stop in spans]
        self.filled = self.buffer[: sum(sizes) + 1]
        *outputs, zeros = self.filled.split([*sizes, 1])
        zeros.zero_()
        return iter(outputs)


def _each(parameter: Tensor | None, num_experts: int) -> Sequence[Tensor | None]:
    """One view an expert, or one None an expert."""
    return [None] * num_experts if parameter is None else parameter.unbind(0)


def _by_pair(weights: Tensor, plan: Plan) -> Tensor:
    """Weights (T, k) -> (P, 1), in the order of the pairs, 0 for padding."""
    out = weights.new_zeros(plan.num_pairs + 1)
    out[plan.position.view(-1)] = weights.reshape(-1)
    return out[:-1].unsqueeze(1)


def _without_absent(weights: Tensor, plan: Plan) -> Tensor:
    return weights if plan.absent is None else weights.masked_fill(plan.absent, 0)
