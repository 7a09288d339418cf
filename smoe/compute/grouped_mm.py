"""Grouped products on CUDA: one ``torch.nn.functional.grouped_mm`` a layer, whose offsets stay on the device.

Nothing waits for the GPU, and everything is plain autograd, so torch.compile sees through it. Runs wherever PyTorch has
``grouped_mm`` (its CPU fallback is how the tests reach it), but is chosen on CUDA in bfloat16 alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts
from ..router import Routing


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    _check(dtype, experts)
    num_tokens, top_k = routing.indices.shape
    if num_tokens == 0:  # all have a gradient nevertheless
        return x.to(dtype) + 0 * sum(p.sum().to(dtype) for p in (*experts.parameters(), routing.weights))
    with torch.autocast(device, enabled=False):
        x = x.to(dtype)
        indices, weights, present = routing.indices, routing.weights, None
        if routing.absent:
            # Empty slots go to the end, beyond the last offset, where nothing is computed: neither what the kernels
            # leave there nor its gradient may get any further.
            weights = weights.masked_fill(indices < 0, 0)
            indices = indices.masked_fill(indices < 0, experts.num_experts)
        expert, order = indices.reshape(-1).sort(stable=True)
        every = torch.arange(experts.num_experts, device=x.device)
        offsets = torch.searchsorted(expert, every, right=True).to(torch.int32)
        rows = x[order // top_k]
        if routing.absent:
            present = (expert < experts.num_experts).unsqueeze(1)
            rows = _keep(rows, present)
            expert = expert.clamp_max(experts.num_experts - 1)
        up, gate = _linear(rows, experts.up, experts.up_bias, expert, offsets, present), None
        if experts.gate is not None:
            gate = _linear(rows, experts.gate, experts.gate_bias, expert, offsets, present)
        hidden = _keep(experts.hidden(up, gate), present)
        out = _keep(F.grouped_mm(hidden, experts.down.to(dtype), offs=offsets), present)
        if experts.down_bias is not None:
            out = out + experts.down_bias.to(dtype)[expert]
        # Back to the order of the tokens by a gather: sums are deterministic, and in float32 within the product.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=x.device))
        out = out[back].view(num_tokens, top_k, -1)
        return torch.bmm(weights.to(dtype).unsqueeze(1), out).squeeze(1)


def usable(x: Tensor, experts: Experts) -> bool:
    """Whether the CUDA kernel takes this input: bfloat16, rows of whole 16 bytes."""
    if x.device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype == torch.bfloat16 and experts.d_model % 8 == 0 and experts.d_expert % 8 == 0


def _check(dtype: torch.dtype, experts: Experts) -> None:
    """A ValueError for float64, and for rows that are not whole 16 bytes, whose strides PyTorch would dislike."""
    if dtype == torch.float64:
        raise ValueError(f"x is {dtype}; compute 'grouped_mm' takes 16 or 32 bits")
    multiple = 16 // dtype.itemsize
    for name, width in (("d_model", experts.d_model), ("an expert's hidden width", experts.d_expert)):
        if width % multiple:
            raise ValueError(f"{name} is {width}; compute 'grouped_mm' needs a multiple of {multiple} in {dtype}")


def _keep(rows: Tensor, present: Tensor | None) -> Tensor:
    """The rows of empty slots and their gradients set to 0, whatever they hold (``0 * nan`` would be nan)."""
    return rows if present is None else torch.where(present, rows, 0)


def _linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor, offsets: Tensor, present: Tensor | None
) -> Tensor:
    out = _keep(F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=offsets), present)
    return out if bias is None else out + bias.to(rows.dtype)[expert]
