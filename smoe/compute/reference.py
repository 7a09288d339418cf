"""The reference path: one expert after the other, plain autograd. Slow and short; all other paths must equal it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts
from ..router import Routing


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """``y[t] = sum_j weights[t, j] * E_indices[t, j](x[t])`` (the paper's Eq. 1); x (T, d) -> y (T, d)."""
    y = torch.zeros_like(x)
    for e in range(experts.num_experts):
        token, slot = (routing.indices == e).nonzero(as_tuple=True)
        # Experts without tokens stay in the graph, with gradients of 0: DDP finds no unused parameter.
        rows = x[token]
        up = F.linear(rows, experts.up[e], None if experts.up_bias is None else experts.up_bias[e])
        gate = None
        if experts.gate is not None:
            gate = F.linear(rows, experts.gate[e], None if experts.gate_bias is None else experts.gate_bias[e])
        out = experts.hidden(up, gate) @ experts.down[e]
        if experts.down_bias is not None:
            out = out + experts.down_bias[e]
        y = y.index_add(0, token, (out * routing.weights[token, slot].unsqueeze(1)).to(y.dtype))
    return y
