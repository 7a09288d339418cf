"""A k of its own for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import PartialRouting, Routing


def first_choices(routing: Routing, k_per_token: Tensor, score: str) -> PartialRouting:
    """Each token's first choices, with the weights of a routing to them alone; the slots behind them are empty.

    Args:
        routing: to the k experts of each of T tokens, the first choice first.
        k_per_token: (T,), each in 1..k.
        score: the rule that made the weights.
    """
    empty = torch.arange(routing.indices.shape[1], device=k_per_token.device) >= k_per_token.unsqueeze(1)
    weights = routing.weights.masked_fill(empty, 0)
    if score == "softmax_after_topk":  # the softmax over fewer logits; the first weight is at least 1 / k
        weights = weights / weights.sum(1, keepdim=True)
    return PartialRouting(routing.indices.masked_fill(empty, -1), weights, None)
