"""Int8: experts that ``smoe.export.to_int8`` has quantised, computed as torchao computes a quantised linear layer.

Every output of every expert's matrices has a scale of its own. Weight-only, the products are those of the inputs'
dtype. Dynamic, every token's input and every pair's hidden units are rounded to int8 too, with a scale each, and the
products are integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from ..uncompiled import uncompiled
from .dense import dense_weights
from .products import product_dtype

_STEPS = 127.5  # the largest absolute value, in steps: torchao's symmetric scale is (max - min) / 255


@uncompiled  # how many rows an expert gets is in the data
def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d). Gradients reach x if only weights are quantised."""
    if not x.shape[0]:
        return torch.zeros_like(x)
    x = x.to(product_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        return _compute(x, experts, routing)


def _compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    indices, num_experts = routing.indices, experts.num_experts
    dynamic = experts.up.act_quant_kwargs is not None
    rows, row_scale = _quantize(x) if dynamic else (x, None)
    weights = dense_weights(routing.weights.to(x.dtype), indices, num_experts, routing.absent)
    everyone = indices.shape[1] == num_experts and not routing.absent
    y = torch.zeros_like(x)
    for e in range(num_experts):
        token = slice(None) if everyone else (indices == e).any(1).nonzero().squeeze(1)
        part, part_scale = rows[token], None if row_scale is None else row_scale[token]
        if not len(part):
            continue

        def first(weight: Any, bias: Tensor | None, e: int = e, x: Tensor = part, scale: Any = part_scale) -> Tensor:
            return _linear(x, scale, weight.qdata[e].t(), weight.scale[e, :, 0], None if bias is None else bias[e])

        gate = first(experts.gate, experts.gate_bias) if experts.gated else None
        hidden = experts.hidden(first(experts.up, experts.up_bias), gate).to(x.dtype)
        hidden, hidden_scale = _quantize(hidden) if dynamic else (hidden, None)
        bias = None if experts.down_bias is None else experts.down_bias[e]
        out = _linear(hidden, hidden_scale, experts.down.qdata[e], experts.down.scale[e, 0], bias).to(x.dtype)
        weighted = out * weights[token, e].unsqueeze(1)
        y = y + weighted if everyone else y.index_add(0, token, weighted)
    return y


def _linear(x: Tensor, row_scale: Tensor | None, matrix: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, d) @ the int8 matrix (d, m), times the scales (n, 1) and (m,), plus bias (m,) -> (n, m)."""
    out = _product(x, matrix)
    out = out if row_scale is None else out * row_scale
    scale = scale.to(out.dtype)
    return out * scale if bias is None else torch.addcmul(bias.to(out.dtype), out, scale)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, d) as int8 numbers, and the step (T, 1), float32, between two of them, as torchao rounds activations."""
    with torch.no_grad():
        x = x.float()
        scale = (x.abs().amax(1, keepdim=True) / _STEPS).clamp_(min=torch.finfo(torch.float32).eps)
        return (x * (1 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (n, d) @ b (d, m), b int8: as int32 if a is int8 too, else in the dtype of a."""
    if a.dtype != torch.int8:
        return a @ b.to(a.dtype)
    if a.device.type == "cpu":
        return torch._int_mm(a, b)
    return a.float() @ b.float()  # CUDA's integer product refuses few rows and odd widths
