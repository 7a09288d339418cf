"""Who sits where: the (token, choice) pairs of a routing in the order in which the experts work them off."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """The k * T (token, choice) pairs, expert after expert, and in the order of the tokens within an expert.

    rows: (k * T,) the token of every pair; None if every expert takes all tokens, in their own order.
    spans: N (start, end) pairs, the part of the pairs that belongs to each expert.
    position: (T, k), where the pair of every token and choice is.
    """

    rows: Tensor | None
    spans: list[tuple[int, int]]
    position: Tensor


def make_plan(indices: Tensor, num_experts: int) -> Plan:
    """(T, k) indices -> Plan. Counting, not sorting: a sort of the pairs costs more than the gathers it serves."""
    num_tokens, top_k = indices.shape
    if top_k == num_experts:
        spans = [(e * num_tokens, (e + 1) * num_tokens) for e in range(num_experts)]
        token = torch.arange(num_tokens, device=indices.device).unsqueeze(1)
        return Plan(None, spans, indices * num_tokens + token)
    member = torch.zeros((num_experts, num_tokens), dtype=torch.bool, device=indices.device)
    member.t().scatter_(1, indices, True)
    ends = member.view(-1).cumsum(0)
    position = (ends - 1).view(num_experts, num_tokens).t().gather(1, indices)
    bounds = [0, *ends.view(num_experts, num_tokens)[:, -1].tolist()]
    return Plan(member.nonzero()[:, 1], list(zip(bounds[:-1], bounds[1:], strict=True)), position)


def combine(pairs: Tensor, position: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """``out[t] = sum_j weights[t, j] * pairs[position[t, j]]``; pairs (P, d), position and weights (T, k), out (T, d).

    One read of every pair and one rounding, and no (T, k, d) tensor: what an embedding bag does. On a CPU it is several
    times faster than adding expert after expert with ``index_add_``, which also rounds (or widens to float32) each time.
    """
    out.copy_(F.embedding_bag(position, pairs, mode="sum", per_sample_weights=weights))
