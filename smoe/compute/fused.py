"""Experts as one autograd function, the engine of the fast paths ``grouped`` and ``dense``.

What makes it fast, on a CPU above all:

- the outputs of a token's experts are summed by one embedding bag, which applies the routing weights in passing;
- temporaries are one unit's or one chunk's, used again and again, so that they stay in the cache and no fresh pages
  have to be fetched from the system (for the dense MLP of PyTorch that costs as much as some of its products);
- the product with the routing weight, where it has to be made, is made on the narrower side, d or h;
- backward keeps x and one tensor of hidden units, and gathers rows anew; the bias of the second layer, its gradient,
  and its part in the gradient of the routing weights are one small product each for all experts together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activation import ACTIVATIONS, Activation
from .plan import Plan, full_plan, gathered_plan, local_position
from .products import combine, group_sums, hidden_units, linear, scale_

# Bytes that the outputs of the pairs of one chunk may take: a chunk that stays in the cache is summed faster.
CHUNK_BYTES = 8 << 20
# oneDNN, which runs products of 16 bits on a CPU, compiles a kernel for every new number of rows: several
# milliseconds, more than the product itself takes, and routing makes new numbers at every step. So the rows of an
# expert are padded to a multiple of this, or of about 1/16 of what an expert gets if that is more: the numbers soon
# repeat, and all kernels fit into oneDNN's cache (1024 of them). It costs about 3 % of superfluous rows.
PADDING = 64


def run(x: Tensor, weights: Tensor, indices: Tensor | None, merge: int, experts) -> Tensor:
    """x (T, d) -> y (T, d) through ``experts``.

    indices None: every token visits all N experts, weights (T, N); ``merge`` experts side by side are one product.
    Else weights and indices (T, k), and merge is 1. Not differentiable twice.
    """
    # Under autocast the matrix products run in its dtype, as those of nn.Linear do.
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    parameters = (experts.up, experts.up_bias, experts.gate, experts.gate_bias, experts.down, experts.down_bias)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling() and experts.activation is ACTIVATIONS.get(experts.activation.name):
            return experts_op(x.to(dtype), weights, indices, merge, experts.activation.name, *parameters)[0]
        if not torch.is_grad_enabled():
            cast = [None if p is None else p.to(dtype) for p in parameters]
            return forward(x.to(dtype), weights.to(dtype), indices, merge, experts.activation, cast, False)[0]
        return _Fused.apply(x.to(dtype), weights, indices, merge, experts.activation, *parameters)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, indices, merge, activation, *parameters):
        cast = [None if p is None else p.to(x.dtype) for p in parameters]
        keep = any(ctx.needs_input_grad)
        y, saved = forward(x, weights.to(x.dtype), indices, merge, activation, cast, keep)
        if keep:
            ctx.save_for_backward(x, weights, indices, *cast, *saved)
            ctx.merge, ctx.activation = merge, activation
            ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weights, indices, *rest = ctx.saved_tensors
        grad_x, grad_weights, grads = backward(
            grad_y.contiguous(),
            x,
            weights.to(x.dtype),
            indices,
            ctx.merge,
            ctx.activation,
            rest[:6],
            rest[6:],
            ctx.needs_input_grad[1],
            ctx.dtypes,
        )
        grad_weights = None if grad_weights is None else grad_weights.to(weights.dtype)
        return grad_x, grad_weights, None, None, None, *grads


def forward(
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    merge: int,
    activation: Activation,
    parameters: list[Tensor | None],
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """y (T, d), and (if ``keep``) what ``backward`` wants saved: one tensor a unit, two if the experts are gated."""
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    num_experts = up.shape[0]
    up, up_bias, gate, gate_bias, down = (_merged(p, merge) for p in (up, up_bias, gate, gate_bias, down))
    y = x.new_empty(x.shape)
    if x.shape[0] == 0:
        return y, []
    plan = make_plan(x, indices, num_experts, merge)
    weights = _without_absent(weights, plan)
    gather = _Rows(plan, x)
    kept, gates = [], []
    for u in range(up.shape[0]):
        xu = gather(u)
        if gate is None:
            kept.append(hidden_units(xu, up[u], _row(up_bias, u), activation))
        else:
            kept.append(linear(xu, up[u], _row(up_bias, u)))
            gates.append(hidden_units(xu, gate[u], _row(gate_bias, u), activation))
    # Experts that are merged in one product can be weighted only before it, on their hidden units.
    early = merge > 1
    pair_weights = _by_pair(weights, plan, merge) if early else None
    for c, (first, end, spans) in enumerate(plan.chunks):
        out = _Outputs(x, spans)
        for u, (start, stop) in enumerate(spans):
            part = slice(start - plan.spans[u][0], stop - plan.spans[u][0])
            hidden = _activated(kept[u][part], gates[u][part] if gates else None, activation)
            if early:
                hidden = scale_(hidden, pair_weights[start:stop], torch.empty_like(hidden))
            torch.mm(hidden, down[u], out=out.take(stop - start))
        position = local_position(plan, c, indices)
        combine(out.pairs, position, None if early else weights[first:end], y[first:end])
    if down_bias is not None:
        y.addmm_(dense_weights(weights, indices, num_experts, plan.absent is not None), down_bias)
    return y, (kept + gates if keep else [])


def backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    merge: int,
    activation: Activation,
    parameters: list[Tensor | None],
    saved: list[Tensor],
    need_weights: bool,
    dtypes: list[torch.dtype | None],
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Gradients of x (T, d), of weights (if needed) and of the parameters, these in ``dtypes``."""
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    num_experts = up.shape[0]
    grad_x = torch.empty_like(x)
    make = torch.empty_like if x.shape[0] else torch.zeros_like
    grads = [None if p is None else make(p, dtype=dtype) for p, dtype in zip(parameters, dtypes, strict=True)]
    if x.shape[0] == 0:
        return grad_x, torch.zeros_like(weights) if need_weights else None, grads
    g_up, g_up_bias, g_gate, g_gate_bias, g_down = (_merged(g, merge) for g in grads[:5])
    up, gate, down = (_merged(p, merge) for p in (up, gate, down))
    num_units, width, d = up.shape
    gated = gate is not None
    plan = make_plan(x, indices, num_experts, merge)
    weights = _without_absent(weights, plan)
    pair_weights = _by_pair(weights, plan, merge)
    # One more, for absent slots.
    pair_grad = pair_weights.new_zeros(plan.num_pairs + 1, merge) if need_weights else None
    # Where to multiply with the routing weight. "narrow": hidden units and their gradient, after grad_weights has been
    # taken from it; else rows of x and grad_y (of grad_y alone, first thing, if grad_weights isn't asked for).
    narrow = merge > 1 or (width < d if need_weights else 2 * width < d)
    late = need_weights and not narrow
    longest = max(end - start for start, end in plan.spans)
    gather_x, gather_g = _Rows(plan, x), _Rows(plan, grad_y)
    buffer = [x.new_empty(longest, width) for _ in range(2 if gated else 1)]
    scaled = [x.new_empty(longest, d) for _ in range(2 if late else 1)] if not narrow else []
    grad_pre: list[tuple[Tensor, ...]] = []
    for u, (start, end) in enumerate(plan.spans):
        n = end - start
        if n == 0:
            grad_pre.append(())
            for g in (g_up, g_up_bias, g_gate, g_gate_bias, g_down):
                if g is not None:
                    g[u].zero_()
            continue
        xu, gu, wu = gather_x(u), gather_g(u), pair_weights[start:end]
        wg = gu if narrow else torch.mul(gu, wu, out=scaled[0][:n])
        grad_hidden = x.new_empty(n, width)
        torch.mm(gu if narrow or late else wg, down[u].t(), out=grad_hidden)
        kept = saved[u]
        if gated:
            kept_gate = saved[num_units + u]
            act = kept_gate if activation.saves_output else activation(kept_gate)
            hidden = torch.mul(act, kept, out=buffer[1][:n])
        else:
            hidden = kept if activation.saves_output else activation(kept)
        if need_weights:
            group_sums(torch.mul(grad_hidden, hidden, out=buffer[0][:n]), merge, pair_grad[start:end])
        _mm_into(g_down[u], scale_(hidden, wu, buffer[0][:n]).t() if narrow else hidden.t(), wg)
        if gated:
            grad_act = torch.mul(grad_hidden, kept, out=x.new_empty(n, width))
            grads_here = (
                torch.mul(grad_hidden, act, out=grad_hidden),
                activation.backward(grad_act, kept_gate, out=grad_act),
            )
        else:
            grads_here = (activation.backward(grad_hidden, kept, out=grad_hidden),)
        if narrow:
            grads_here = tuple(scale_(g, wu, g) for g in grads_here)
        wx = torch.mul(xu, wu, out=scaled[1][:n]) if late else xu
        for grad, g_weight, g_bias in zip(grads_here, (g_up, g_gate), (g_up_bias, g_gate_bias), strict=False):
            _mm_into(g_weight[u], grad.t(), wx)
            if g_bias is not None:
                g_bias[u].copy_(torch.mm(wu.t(), grad).squeeze(0) if late else grad.sum(0))
        grad_pre.append(grads_here)
        del hidden, grad_hidden
    del buffer, scaled, gather_x, gather_g
    present = None if plan.absent is None else (~plan.absent).to(x.dtype)
    for c, (first, end, spans) in enumerate(plan.chunks):
        out = _Outputs(x, spans)
        for u, (start, stop) in enumerate(spans):
            target = out.take(stop - start)
            if stop > start:
                part = slice(start - plan.spans[u][0], stop - plan.spans[u][0])
                torch.mm(grad_pre[u][0][part], up[u], out=target)
                if gated:
                    target.addmm_(grad_pre[u][1][part], gate[u])
        factor = weights if late else present
        factor = None if factor is None else factor[first:end]
        combine(out.pairs, local_position(plan, c, indices), factor, grad_x[first:end])
    grad_weights = None
    if need_weights:
        grad_weights = pair_grad[plan.position.view(-1)].view(weights.shape)
    if down_bias is not None:
        _mm_into(grads[5], dense_weights(weights, indices, num_experts, plan.absent is not None).t(), grad_y)
        if need_weights:
            of_bias = grad_y @ down_bias.t()
            grad_weights += of_bias if indices is None else of_bias.gather(1, indices.clamp_min(0))
    if grad_weights is not None:
        grad_weights = _without_absent(grad_weights, plan)
    return grad_x, grad_weights, grads


class _Rows:
    """The rows of ``x`` that a unit takes, gathered into one buffer that the next unit overwrites."""

    def __init__(self, plan: Plan, x: Tensor) -> None:
        self.plan, self.x = plan, x
        longest = max(end - start for start, end in plan.spans)
        self.buffer = None if plan.rows is None else x.new_empty(longest, x.shape[1])

    def __call__(self, unit: int) -> Tensor:
        if self.buffer is None:
            return self.x
        start, end = self.plan.spans[unit]
        return torch.index_select(self.x, 0, self.plan.rows[start:end], out=self.buffer[: end - start])


class _Outputs:
    """One chunk's (pairs, d) outputs, filled unit after unit."""

    def __init__(self, x: Tensor, spans: list[tuple[int, int]]) -> None:
        self.pairs = x.new_empty(sum(stop - start for start, stop in spans), x.shape[1])
        self.filled = 0

    def take(self, count: int) -> Tensor:
        self.filled += count
        return self.pairs[self.filled - count : self.filled]


def make_plan(x: Tensor, indices: Tensor | None, num_experts: int, merge: int) -> Plan:
    """The plan for T > 0 tokens, in chunks of ``CHUNK_BYTES``."""
    num_tokens, d = x.shape
    pairs_a_token = num_experts // merge if indices is None else indices.shape[1]
    count = -(-num_tokens * pairs_a_token * d * x.element_size() // CHUNK_BYTES)
    chunk = -(-num_tokens // count)
    if indices is None:
        return full_plan(num_tokens, num_experts // merge, chunk, x.device)
    multiple = multiple_of(x, indices.numel(), num_experts)
    return gathered_plan(indices, num_experts, chunk, multiple)


def multiple_of(x: Tensor, num_pairs: int, num_experts: int) -> int:
    """What the rows of an expert are padded to a multiple of (see ``PADDING``)."""
    if x.device.type == "cpu" and x.element_size() == 2:
        return PADDING * max(1, num_pairs // (16 * PADDING * num_experts))
    return 1


def _merged(parameter: Tensor | None, merge: int) -> Tensor | None:
    """(N, h, ...) -> (N / merge, merge * h, ...), the same memory."""
    if parameter is None or merge == 1:
        return parameter
    return parameter.view(parameter.shape[0] // merge, merge * parameter.shape[1], *parameter.shape[2:])


def _row(bias: Tensor | None, unit: int) -> Tensor | None:
    return None if bias is None else bias[unit]


def _activated(kept: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """Hidden units from what was kept of them."""
    if gate is not None:
        return kept * (gate if activation.saves_output else activation(gate))
    return kept if activation.saves_output else activation(kept)


def _by_pair(weights: Tensor, plan: Plan, merge: int) -> Tensor:
    """Weights (T, k) -> (P, 1), in the order of the pairs, 0 for padding; merged: (T, N) -> (P, merge)."""
    out = weights.new_zeros(plan.num_pairs + 1, merge)
    out[plan.position.view(-1)] = weights.reshape(-1, merge)
    return out[:-1]


def dense_weights(weights: Tensor, indices: Tensor | None, num_experts: int, absent: bool) -> Tensor:
    """(T, N): the weight of every expert for every token, 0 where it isn't chosen; ``absent`` as in ``Routing``."""
    if indices is None:
        return weights
    if absent:
        empty = indices < 0
        # Added, since an empty slot's zero must not overwrite the weight of the expert it is put with.
        zeros = weights.new_zeros(weights.shape[0], num_experts)
        return zeros.scatter_add(1, indices.masked_fill(empty, 0), weights.masked_fill(empty, 0))
    return weights.new_zeros(weights.shape[0], num_experts).scatter(1, indices, weights)


def _without_absent(weights: Tensor, plan: Plan) -> Tensor:
    return weights if plan.absent is None else weights.masked_fill(plan.absent, 0)


def _mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


# At the end, since its operators call this module's functions.
from .compiled import experts_op  # noqa: E402
