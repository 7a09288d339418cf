"""Int8: experts that ``smoe.export.to_int8`` has quantised, computed as torchao computes a quantised linear layer.

Every output of every expert's matrices has a scale of its own. Weight-only, the products are those of the inputs'
dtype. Dynamic, every token's input and every pair's hidden units are rounded to int8 too, with a scale each, and the
products are integers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from ..uncompiled import uncompiled
from .grouping import group
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
    dynamic = experts.up.act_quant_kwargs is not None
    rows, row_scale = _quantize(x) if dynamic else (x, None)
    grouping = group(rows, routing.indices, experts.num_experts)
    counts = [end - start for start, end in grouping.spans]
    expert = torch.arange(experts.num_experts, device=x.device)
    expert = expert.repeat_interleave(torch.tensor(counts, device=x.device), output_size=grouping.num_pairs)
    rows, row_scale = rows[grouping.tokens], None if row_scale is None else row_scale[grouping.tokens]

    def linear(rows: Tensor, row_scale: Tensor | None, matrices: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The pairs' rows (P, n) through their experts' matrices (N, n, m), scale and bias (N, m) -> (P, m)."""
        products = [_product(part, matrices[e]) for e, part in enumerate(rows.split(counts)) if len(part)]
        out = torch.cat(products).to(x.dtype if row_scale is None else torch.float32)
        out = out if row_scale is None else out * row_scale
        scale = scale.to(out.dtype)[expert]
        out = out * scale if bias is None else torch.addcmul(bias.to(out.dtype)[expert], out, scale)
        return out.to(x.dtype)

    def first(weight: Any, bias: Tensor | None) -> Tensor:
        return linear(rows, row_scale, weight.qdata.transpose(1, 2), weight.scale.squeeze(2), bias)

    gate = first(experts.gate, experts.gate_bias) if experts.gated else None
    hidden = experts.hidden(first(experts.up, experts.up_bias), gate)
    hidden, hidden_scale = _quantize(hidden) if dynamic else (hidden, None)
    down = experts.down
    out = linear(hidden, hidden_scale, down.qdata, down.scale.squeeze(1), experts.down_bias)
    if grouping.absent is not None:
        out = F.pad(out, (0, 0, 0, 1))  # the row that absent slots point at
    weights = grouping.without_absent(routing.weights).to(x.dtype)
    return F.embedding_bag(grouping.position, out, mode="sum", per_sample_weights=weights)


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
