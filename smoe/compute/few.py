"""Few: at most 64 tokens without gradients on a CPU, where starting operators costs as much as computing.

Weights are read from memory once for all tokens, in a fixed number of operators, with no loop over experts. What is
computed depends on how many of the experts are chosen, that is on the number of pairs P = T * k:

============  =====================================  ==================================================================
P             first layer                            second layer
============  =====================================  ==================================================================
below N / 2   the chosen experts, copied out         rows of the chosen experts, weighted and summed by an embedding bag
up to N       all experts                            the same
above N       all experts                            all experts; the hidden units carry the routing weight, 0 if it is
                                                     not chosen
============  =====================================  ==================================================================

The embedding bag reads rows where they lie: hidden unit i of an expert adds ``hidden[i] * down[i]`` to the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from . import dense, grouped
from .dense import dense_weights
from .fast_path import Parameters, cast
from .products import linear, product_dtype, scale_

MOST_TOKENS = 64
# Multiply-adds that `grouped` must save per expert before it is worth its operators: at d 768, h 192 and 64 tokens it
# was faster at k = 4 (7 million) and slower at k = 8 (4.7 million).
GROUPED_SAVES = 6 << 20


def usable(x: Tensor, experts: Experts, routing: Routing) -> bool:
    """Whether this path computes this input, and does it faster than ``grouped``."""
    num_tokens, num_experts = x.shape[0], experts.num_experts
    if not 0 < num_tokens <= MOST_TOKENS or not possible(x, experts):
        return False
    slots_left = num_tokens * (num_experts - routing.indices.shape[1])
    return slots_left * experts.d_model * experts.d_expert <= GROUPED_SAVES * num_experts


def possible(x: Tensor, experts: Experts) -> bool:
    """Whether nothing is needed that this path lacks: gradients, dropout, another device, a graph of torch.compile."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not experts.drops and x.shape[0] > 0


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``; by another path what is not :func:`possible`."""
    if not possible(x, experts):
        path = dense if routing.indices.shape[1] == experts.num_experts else grouped
        return path.compute(x, experts, routing)
    if not torch.is_autocast_enabled("cpu"):
        return _compute(x, experts, routing)
    x = x.to(product_dtype(x))
    with torch.autocast("cpu", enabled=False):
        return _compute(x, experts, routing)


def _compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    parameters = Parameters(
        experts.up, experts.up_bias, experts.gate, experts.gate_bias, experts.down, experts.down_bias
    )
    if any(p is not None and p.dtype != x.dtype for p in parameters):
        parameters = cast(parameters, x.dtype)
    indices, weights, num_experts = routing.indices, routing.weights.to(x.dtype), experts.num_experts
    if routing.absent or indices.numel() > num_experts:
        return _all_experts(x, experts, parameters, dense_weights(weights, indices, num_experts, routing.absent))
    if indices.shape[1] == num_experts:  # one token, all experts
        return _all_experts(x, experts, parameters, torch.zeros_like(weights).scatter_(1, indices, weights))
    return _chosen_experts(x, experts, parameters, weights, indices)


def _all_experts(x: Tensor, experts: Experts, parameters: Parameters, weights: Tensor) -> Tensor:
    """One dense MLP whose hidden units are scaled; weights (T, N)."""
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    hidden = experts.hidden(_linear(x, up, up_bias), None if gate is None else _linear(x, gate, gate_bias))
    hidden = scale_(hidden, weights, hidden)
    down = down.reshape(-1, x.shape[1])
    if down_bias is not None:
        return torch.addmm(weights @ down_bias, hidden, down)
    return hidden @ down


def _chosen_experts(x: Tensor, experts: Experts, parameters: Parameters, weights: Tensor, indices: Tensor) -> Tensor:
    """The chosen experts' rows; weights and indices (T, k)."""
    (num_tokens, d), k, (num_experts, h) = x.shape, indices.shape[1], parameters.up.shape[:2]
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    chosen = indices.reshape(-1)

    def first(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """(T, k * h): the linear output of the chosen experts."""
        if weight is None:
            return None
        if 2 * chosen.shape[0] < num_experts:
            rows = weight.index_select(0, chosen).view(num_tokens, k * h, d)
            out = torch.bmm(rows, x.unsqueeze(2)).squeeze(2) if num_tokens > 1 else torch.mv(rows[0], x[0]).unsqueeze(0)
            return out if bias is None else out.add_(bias.index_select(0, chosen).view(num_tokens, k * h))
        out = _linear(x, weight, bias).view(num_tokens, num_experts, h)
        return out.gather(1, indices.unsqueeze(2).expand(-1, -1, h)).view(num_tokens, k * h)

    hidden = experts.hidden(first(up, up_bias), first(gate, gate_bias))
    hidden = scale_(hidden, weights, hidden)
    rows = (indices.unsqueeze(2) * h + torch.arange(h)).view(-1)
    # Not F.embedding_bag, whose checks take as long as the sum itself. The 0 is mode="sum".
    first_rows = torch.arange(0, num_tokens * k * h, k * h)
    y = torch.embedding_bag(down.reshape(-1, d), rows, first_rows, False, 0, False, hidden.reshape(-1))[0]
    return y if down_bias is None else y.addmm_(dense_weights(weights, indices, num_experts, False), down_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, d) through all experts' weight (N, h, d) and bias (N, h) -> (T, N * h)."""
    return linear(x, weight.reshape(-1, x.shape[1]), None if bias is None else bias.reshape(-1))
