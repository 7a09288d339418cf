"""The fast path: one matrix product per expert over gathered rows, in one autograd function.

What makes it fast, on a CPU above all: every temporary is one expert's, in buffers that are used again and stay in the
cache; the outputs of a token's experts are summed by one embedding bag, which applies the routing weights in passing;
backward keeps x and one activation per expert and gathers the rows anew. Tokens go through in chunks, which bounds
the temporaries; with k = N no rows are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activation import Activation
from ..experts import Experts
from ..router import Routing
from .plan import combine, make_plan

# Bytes that the outputs of all pairs (token, choice) of one chunk may take.
CHUNK_BYTES = 24 << 20


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``. Not differentiable twice."""
    # Under autocast the matrix products run in its dtype, as those of nn.Linear do.
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    parameters = (experts.up, experts.up_bias, experts.gate, experts.gate_bias, experts.down, experts.down_bias)
    with torch.autocast(x.device.type, enabled=False):
        return _Grouped.apply(x.to(dtype), routing.weights, routing.indices, experts.activation, *parameters)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, indices, activation, *parameters):
        cast = [None if p is None else p.to(x.dtype) for p in parameters]
        w = weights.to(x.dtype)
        keep = any(ctx.needs_input_grad)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        saved: list[Tensor] = []
        for chunk in _chunks(x, indices):
            forward_chunk(x[chunk], w[chunk], indices[chunk], activation, cast, y[chunk], saved if keep else None)
        if keep:
            ctx.save_for_backward(x, w, indices, *(p for p in cast if p is not None), *saved)
            ctx.activation, ctx.present = activation, [p is not None for p in cast]
            ctx.dtypes = weights.dtype, [None if p is None else p.dtype for p in parameters]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, w, indices, *rest = ctx.saved_tensors
        cast = [rest.pop(0) if present else None for present in ctx.present]
        weights_dtype, dtypes = ctx.dtypes
        need_weights = ctx.needs_input_grad[1]
        chunks = _chunks(x, indices)
        grad_x = torch.empty_like(x)
        grad_w = torch.empty(w.shape, dtype=x.dtype, device=x.device) if need_weights else None
        # A sum over several chunks is kept in float32: rounding it to bfloat16 chunk by chunk would lose accuracy.
        dtypes = [torch.promote_types(x.dtype, torch.float32) if len(chunks) > 1 else d for d in dtypes]
        make = torch.zeros_like if not chunks else torch.empty_like
        grads = [None if p is None else make(p, dtype=d) for p, d in zip(cast, dtypes, strict=True)]
        for i, chunk in enumerate(chunks):
            backward_chunk(
                grad_y[chunk],
                x[chunk],
                w[chunk],
                indices[chunk],
                ctx.activation,
                cast,
                rest,
                grad_x[chunk],
                grad_w[chunk] if need_weights else None,
                [None if g is None else _Accumulate(g, first=i == 0) for g in grads],
            )
        grads = [None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes[1], strict=True)]
        return grad_x, grad_w.to(weights_dtype) if need_weights else None, None, None, *grads


def _chunks(x: Tensor, indices: Tensor) -> list[slice]:
    """Slices of the tokens, equally long but for rounding, so that no chunk's outputs exceed ``CHUNK_BYTES``."""
    num_tokens, top_k = indices.shape
    if num_tokens == 0:
        return []
    count = -(-num_tokens * top_k * x.shape[1] * x.element_size() // CHUNK_BYTES)
    size = -(-num_tokens // count)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def forward_chunk(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: Activation,
    parameters: list[Tensor | None],
    y: Tensor,
    saved: list[Tensor] | None,
) -> None:
    """Writes y (T, d); appends to ``saved`` what ``backward_chunk`` takes from it, expert by expert."""
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    plan = make_plan(indices, up.shape[0])
    out = x.new_empty(indices.numel(), x.shape[1])
    gather = _Rows(plan, x)
    for e, (start, end) in enumerate(plan.spans):
        xe = gather(e)
        hidden = _linear(xe, up[e], up_bias, e)
        if gate is None:
            if activation.saves_output:
                hidden = activation.forward_(hidden)
                keep = (hidden,)
            else:
                keep = (hidden,)
                hidden = activation(hidden)
        else:
            act = _linear(xe, gate[e], gate_bias, e)
            keep = (hidden, act)
            if activation.saves_output:
                act = activation.forward_(act)
            else:
                act = activation(act)
            hidden = hidden * act
        if saved is not None:
            saved.extend(keep)
        if down_bias is None:
            torch.mm(hidden, down[e], out=out[start:end])
        else:
            torch.addmm(down_bias[e], hidden, down[e], out=out[start:end])
    combine(out, plan.position, weights, y)


def backward_chunk(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: Activation,
    parameters: list[Tensor | None],
    saved: list[Tensor],
    grad_x: Tensor,
    grad_weights: Tensor | None,
    grads: list[_Accumulate | None],
) -> None:
    """Writes grad_x (T, d) and grad_weights (T, k), adds to ``grads``; takes its part from the front of ``saved``.

    Where the routing weights need a gradient, the product with the weight comes last, on the narrower of the two
    sides (d or h): grad_weights wants the gradient of the hidden units without it.
    """
    up, _, gate, _, down, down_bias = parameters
    g_up, g_up_bias, g_gate, g_gate_bias, g_down, g_down_bias = grads
    plan = make_plan(indices, up.shape[0])
    row_weights = weights.new_empty(indices.numel(), 1)
    row_weights[plan.position.reshape(-1)] = weights.reshape(-1, 1)
    out = x.new_empty(indices.numel(), x.shape[1])
    pair_grad = x.new_empty(indices.numel()) if grad_weights is not None else None
    longest = max(end - start for start, end in plan.spans)
    h = up.shape[1]
    gather_x, gather_g = _Rows(plan, x), _Rows(plan, grad_y)
    buffer = [x.new_empty(longest, h) for _ in range(2 if gate is None else 4)]
    scaled_x, scaled_g = (x.new_empty(longest, x.shape[1]) for _ in range(2))
    for e, (start, end) in enumerate(plan.spans):
        n = end - start
        xe, ge, we = gather_x(e), gather_g(e), row_weights[start:end]
        grad_hidden, product = buffer[0][:n], buffer[1][:n]
        wg = torch.mul(ge, we, out=scaled_g[:n])
        late = pair_grad is not None
        torch.mm(ge if late else wg, down[e].t(), out=grad_hidden)
        if gate is None:
            kept = saved.pop(0)
            hidden = kept if activation.saves_output else activation(kept)
        else:
            pre, kept = saved.pop(0), saved.pop(0)
            act = kept if activation.saves_output else activation(kept)
            hidden = torch.mul(act, pre, out=buffer[2][:n])
        if late:
            torch.sum(torch.mul(grad_hidden, hidden, out=product), 1, out=pair_grad[start:end])
            if down_bias is not None:
                pair_grad[start:end] += torch.mv(ge, down_bias[e])
        g_down.mm(e, hidden.t(), wg)
        if g_down_bias is not None:
            g_down_bias.row(e, wg.sum(0))
        wx = torch.mul(xe, we, out=scaled_x[:n]) if late else xe
        if gate is None:
            grad_pre = activation.backward(grad_hidden, kept, out=grad_hidden)
        else:
            grad_gate_pre = activation.backward(torch.mul(grad_hidden, pre, out=product), kept, out=product)
            grad_pre = torch.mul(grad_hidden, act, out=grad_hidden)
            g_gate.mm(e, grad_gate_pre.t(), wx)
            if g_gate_bias is not None:
                g_gate_bias.row(e, _weighted_sum(grad_gate_pre, we if late else None))
        g_up.mm(e, grad_pre.t(), wx)
        if g_up_bias is not None:
            g_up_bias.row(e, _weighted_sum(grad_pre, we if late else None))
        torch.mm(grad_pre, up[e], out=out[start:end])
        if gate is not None:
            out[start:end].addmm_(grad_gate_pre, gate[e])
    combine(out, plan.position, weights if pair_grad is not None else None, grad_x)
    if grad_weights is not None:
        torch.index_select(pair_grad, 0, plan.position.reshape(-1), out=grad_weights.view(-1))


class _Rows:
    """The rows of ``x`` that expert e takes, gathered into one buffer that the next expert overwrites."""

    def __init__(self, plan, x: Tensor) -> None:
        self.plan, self.x = plan, x
        longest = max(end - start for start, end in plan.spans)
        self.buffer = None if plan.rows is None else x.new_empty(longest, x.shape[1])

    def __call__(self, e: int) -> Tensor:
        if self.buffer is None:
            return self.x
        start, end = self.plan.spans[e]
        return torch.index_select(self.x, 0, self.plan.rows[start:end], out=self.buffer[: end - start])


class _Accumulate:
    """Writes (first chunk) or adds (the others) one expert's part of a parameter's gradient."""

    def __init__(self, grad: Tensor, first: bool) -> None:
        self.grad, self.first = grad, first

    def mm(self, e: int, a: Tensor, b: Tensor) -> None:
        """``grad[e] (+)= a @ b``"""
        grad = self.grad[e]
        if grad.dtype == a.dtype:
            torch.mm(a, b, out=grad) if self.first else grad.addmm_(a, b)
        else:
            self.row(e, a @ b)

    def row(self, e: int, value: Tensor) -> None:
        """``grad[e] (+)= value``"""
        self.grad[e].copy_(value) if self.first else self.grad[e].add_(value)


def _weighted_sum(x: Tensor, weights: Tensor | None) -> Tensor:
    """(T, h), (T, 1) -> (h,)"""
    return x.sum(0) if weights is None else torch.mm(weights.t(), x).squeeze(0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, e: int) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias[e], x, weight.t())
