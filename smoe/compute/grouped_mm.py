"""Grouped products on CUDA: one ``torch.nn.functional.grouped_mm`` per linear layer, whose offsets stay on the device.

Nothing waits for the GPU, and everything is plain autograd, so torch.compile sees through it. It runs wherever PyTorch
has ``grouped_mm`` (the tests use its CPU fallback), but is chosen on CUDA in bfloat16 only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from .products import product_dtype


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``.

    Raises:
        ValueError: the products are in float64, or d or h is not a multiple of 16 bytes.
    """
    dtype = product_dtype(x)
    _check(dtype, experts)
    num_tokens, top_k = routing.indices.shape
    if num_tokens == 0:  # x and all parameters get a gradient nevertheless
        return x.to(dtype) + 0 * sum(p.sum().to(dtype) for p in (*experts.parameters(), routing.weights))
    with torch.autocast(x.device.type, enabled=False):
        indices, weights, present = routing.indices, routing.weights, None
        if routing.absent:
            # Empty slots go to the end, beyond the last offset, where nothing is computed: neither what the kernel
            # leaves there nor its gradient may get any further.
            weights = weights.masked_fill(indices < 0, 0)
            indices = indices.masked_fill(indices < 0, experts.num_experts)
        expert, order = indices.reshape(-1).sort(stable=True)
        every = torch.arange(experts.num_experts, device=x.device)
        offsets = torch.searchsorted(expert, every, right=True).to(torch.int32)
        if routing.absent:
            present = (expert < experts.num_experts).unsqueeze(1)
            expert = expert.clamp_max(experts.num_experts - 1)

        def keep(rows: Tensor) -> Tensor:
            """The rows of empty slots and their gradients set to 0, whatever they hold (0 * nan would be nan)."""
            return rows if present is None else torch.where(present, rows, 0)

        def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = keep(F.grouped_mm(rows, weight.to(dtype), offs=offsets))
            return out if bias is None else out + bias.to(dtype)[expert]

        rows = keep(x.to(dtype)[order // top_k])
        up, gate = linear(rows, experts.up.transpose(1, 2), experts.up_bias), None
        if experts.gate is not None:
            gate = linear(rows, experts.gate.transpose(1, 2), experts.gate_bias)
        out = linear(keep(experts.hidden(up, gate)), experts.down, experts.down_bias)
        # Back to the order of the tokens by a gather: sums are deterministic, and in float32 within the product.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=x.device))
        return torch.bmm(weights.to(dtype).unsqueeze(1), out[back].view(num_tokens, top_k, -1)).squeeze(1)


def usable(x: Tensor, experts: Experts) -> bool:
    """Whether the CUDA kernel takes this input: bfloat16, d and h multiples of 16 bytes."""
    if x.device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    return product_dtype(x) == torch.bfloat16 and experts.d_model % 8 == 0 and experts.d_expert % 8 == 0


def _check(dtype: torch.dtype, experts: Experts) -> None:
    if dtype == torch.float64:
        raise ValueError(f"x is {dtype}; compute 'grouped_mm' takes 16 or 32 bits")
    multiple = 16 // dtype.itemsize
    for name, width in (("d_model", experts.d_model), ("an expert's hidden width", experts.d_expert)):
        if width % multiple:
            raise ValueError(f"{name} is {width}; compute 'grouped_mm' needs a multiple of {multiple} in {dtype}")
