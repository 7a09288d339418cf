"""The fast path: one matrix product per expert over gathered rows, in one autograd function.

Only the (T_e, d) side of each product is scaled by the routing weight, the cheaper side; no (T, k, d) tensor exists,
and backward keeps the inputs and one (T_e, h) activation per expert. With k = N no rows are gathered: the experts
side by side are one dense MLP, whose hidden units are scaled by the weight of their expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts import Experts
from ..router import Routing


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``."""
    # Under autocast the matrix products run in its dtype, as those of nn.Linear do.
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    parameters = (experts.up, experts.up_bias, experts.gate, experts.gate_bias, experts.down, experts.down_bias)
    cast = (None if p is None else p.to(dtype) for p in parameters)
    with torch.autocast(x.device.type, enabled=False):
        return _Grouped.apply(x.to(dtype), routing.weights.to(dtype), routing.indices, experts.activation, *cast)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, indices, activation, up, up_bias, gate, gate_bias, down, down_bias):
        num_experts = up.shape[0]
        # (N, T) membership, expert-major, so one nonzero lists the rows of every expert in turn.
        slot = torch.full((num_experts, x.shape[0]), -1, dtype=torch.int64, device=x.device)
        choice = torch.arange(indices.shape[1], device=x.device).expand_as(indices)
        slot.t().scatter_(1, indices, choice)
        expert, rows = (slot >= 0).nonzero(as_tuple=True)
        row_weights = weights[rows, slot[expert, rows]].unsqueeze(1)
        counts = torch.bincount(expert, minlength=num_experts).tolist()

        y = x.new_zeros(x.shape, dtype=torch.float32)
        saved, start = [], 0
        for e, count in enumerate(counts):
            r, w = rows[start : start + count], row_weights[start : start + count]
            start += count
            xe = x[r]
            pre = _linear(xe, up[e], up_bias, e)
            if gate is None:
                hidden = activation(pre)
                saved.append(hidden if activation.saves_output else pre)
            else:
                pre_gate = _linear(xe, gate[e], gate_bias, e)
                act = activation(pre_gate)
                hidden = act * pre
                saved += [pre, act if activation.saves_output else pre_gate]
            out = hidden @ down[e] if down_bias is None else torch.addmm(down_bias[e], hidden, down[e])
            y.index_add_(0, r, (out * w).float())
        ctx.save_for_backward(x, weights, rows, expert, slot, up, gate, down, down_bias, *saved)
        ctx.activation, ctx.counts = activation, counts
        ctx.has_bias = (up_bias is not None, gate_bias is not None)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, weights, rows, expert, slot, up, gate, down, down_bias, *saved = ctx.saved_tensors
        activation = ctx.activation
        row_slots = slot[expert, rows]
        row_weights = weights[rows, row_slots].unsqueeze(1)
        grad_x = x.new_zeros(x.shape, dtype=torch.float32)
        grad_row_weights = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
        grad_gate = None if gate is None else torch.empty_like(gate)
        grad_up_bias = up.new_empty(up.shape[:2]) if ctx.has_bias[0] else None
        grad_gate_bias = up.new_empty(up.shape[:2]) if ctx.has_bias[1] else None
        grad_down_bias = None if down_bias is None else torch.empty_like(down_bias)
        start = 0
        for e, count in enumerate(ctx.counts):
            r, w = rows[start : start + count], row_weights[start : start + count]
            span = slice(start, start + count)
            start += count
            xe, ge = x[r], grad_y[r]
            grad_hidden = ge @ down[e].t()
            if gate is None:
                kept = saved[e]
                hidden = kept if activation.saves_output else activation(kept)
            else:
                pre, kept = saved[2 * e : 2 * e + 2]
                act = kept if activation.saves_output else activation(kept)
                hidden = act * pre
            grad_w = (grad_hidden * hidden).sum(1, dtype=torch.float32)
            if down_bias is not None:
                grad_w += ge @ down_bias[e]
            grad_row_weights[span] = grad_w
            ge *= w
            torch.mm(hidden.t(), ge, out=grad_down[e])
            if grad_down_bias is not None:
                torch.sum(ge, 0, out=grad_down_bias[e])
            xw = xe * w
            if gate is None:
                grad_pre = activation.backward(grad_hidden, kept)
            else:
                grad_pre = grad_hidden * act
                grad_pre_gate = activation.backward(grad_hidden * pre, kept)
                torch.mm(grad_pre_gate.t(), xw, out=grad_gate[e])
                if grad_gate_bias is not None:
                    torch.mv(grad_pre_gate.t(), w.squeeze(1), out=grad_gate_bias[e])
            torch.mm(grad_pre.t(), xw, out=grad_up[e])
            if grad_up_bias is not None:
                torch.mv(grad_pre.t(), w.squeeze(1), out=grad_up_bias[e])
            gx = grad_pre @ up[e]
            if gate is not None:
                gx += grad_pre_gate @ gate[e]
            grad_x.index_add_(0, r, (gx * w).float())
        grad_weights = torch.zeros(weights.shape, dtype=torch.float32, device=x.device)
        grad_weights[rows, row_slots] = grad_row_weights
        return (
            grad_x.to(x.dtype),
            grad_weights.to(weights.dtype),
            None,
            None,
            grad_up,
            grad_up_bias,
            grad_gate,
            grad_gate_bias,
            grad_down,
            grad_down_bias,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, e: int) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias[e], x, weight.t())
