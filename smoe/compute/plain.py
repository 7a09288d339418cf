"""Plain: PyTorch's own operators and plain autograd, for exporters and the transforms of ``torch.func``.

At k = N all experts are one dense MLP whose hidden units are scaled: a graph as small as that of a dense model. At
smaller k it is ``reference``, one expert after the other, each with the tokens that chose it: the graph computes as
little as the layer does, and holds for any number of tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from . import reference
from .dense import dense_weights

NAMES = ("up", "up_bias", "gate", "gate_bias", "down", "down_bias")


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``."""
    if experts.int8 and experts.up.act_quant_kwargs is not None:
        raise ValueError(
            "dynamic int8 experts can't be exported or transformed; export the float32 model and quantise its graph, "
            "or take to_int8(model), weights alone"
        )
    if routing.absent or routing.indices.shape[1] < experts.num_experts or experts.int8:
        return reference.compute(x, experts, routing)
    weights = dense_weights(routing.weights, routing.indices, experts.num_experts, absent=False)
    # By attribute: PEFT may parametrise them.
    there = {name: p for name in NAMES if (p := getattr(experts, name)) is not None}
    mlp = {name: p if p.dtype == x.dtype else p.to(x.dtype) for name, p in there.items()}
    up = _linear(x, mlp["up"], mlp.get("up_bias"))
    gate = _linear(x, mlp["gate"], mlp.get("gate_bias")) if experts.gated else None
    hidden = experts.hidden(up, gate).unflatten(1, (experts.num_experts, -1)) * weights.unsqueeze(2).to(x.dtype)
    y = hidden.flatten(1) @ mlp["down"].flatten(0, 1)
    return y if "down_bias" not in mlp else y + weights.to(x.dtype) @ mlp["down_bias"]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, d) through all experts' weight (N, h, d) and bias (N, h) -> (T, N * h)."""
    return F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
