"""The reference path: one expert after the other, plain autograd. Slow and short; all other paths must equal it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts, is_int8
from ..router import Routing


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """``y[t] = sum_j weights[t, j] * E_indices[t, j](x[t])`` (the paper's Eq. 1); x (T, d) -> y (T, d)."""
    y = torch.zeros_like(x)
    for e in range(experts.num_experts):
        token, slot = (routing.indices == e).nonzero(as_tuple=True)
        # Experts without tokens stay in the graph, with gradients of 0: DDP finds no unused parameter.
        rows = x[token]
        names = ("up", "up_bias", "gate", "gate_bias", "down", "down_bias")
        # In the dtype of x, like the other paths: parameters may be of several.
        own = {name: _of(p, e, x.dtype) for name in names if (p := getattr(experts, name)) is not None}
        up = F.linear(rows, own["up"], own.get("up_bias"))
        gate = F.linear(rows, own["gate"], own.get("gate_bias")) if "gate" in own else None
        out = experts.hidden(up, gate) @ own["down"]
        if "down_bias" in own:
            out = out + own["down_bias"]
        y = y.index_add(0, token, (out * routing.weights[token, slot].unsqueeze(1)).to(y.dtype))
    return y


def _of(parameter: Tensor, e: int, dtype: torch.dtype) -> Tensor:
    """What expert e has of a parameter, in ``dtype``; dequantised if it is int8."""
    own = parameter[e].dequantize() if is_int8(parameter) else parameter[e]
    return own if own.dtype == dtype else own.to(dtype)  # without a node in exported graphs where nothing is cast
