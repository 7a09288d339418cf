"""Which token goes to which ranks: one pass of one layer, as rows of the buffers that the ranks exchange."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The P (token, rank) pairs of one rank's T tokens, each token once for every rank that has an expert it chose.

    This rank's own pairs come first, then those of the others in the order of the ranks; tokens ascend within a rank.

    tokens: (P,) int64, the token of every pair.
    columns: (P, slots) int64, which of the token's k choices live on that rank; -1 where there are no more.
    bags: (P,) int64, all pairs, token after token; (T,) ``starts`` says where each token's begin.
    rows: (E,) int64, the number of pairs for every rank, by rank.
    """

    tokens: Tensor
    columns: Tensor
    bags: Tensor
    starts: Tensor
    rows: Tensor


def make_plan(indices: Tensor, share: int, num_ranks: int, here: int) -> Plan:
    """The plan of (T, k) expert indices (-1: none), where rank r of E has experts r * share .. (r + 1) * share - 1."""
    num_tokens, k = indices.shape
    slots, device = min(k, share), indices.device
    # Ranks are numbered as the buffers are ordered: this one first. Absent choices go to a number beyond the last.
    order = [here, *(rank for rank in range(num_ranks) if rank != here)]
    number = torch.empty(num_ranks + 1, dtype=torch.int64)
    number[order], number[num_ranks] = torch.arange(num_ranks), num_ranks
    number = number.to(device)[torch.div(indices, share, rounding_mode="floor").remainder(num_ranks + 1)]
    # (T, E + 1): how many of its choices a token has on each.
    counts = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(1, number, torch.ones_like(number))
    number, column = number.sort(dim=1, stable=True)
    slot = torch.arange(k, device=device) - (counts.cumsum(1) - counts).gather(1, number)
    columns = torch.full((num_tokens, (num_ranks + 1) * slots), -1, dtype=torch.int64, device=device)
    columns.scatter_(1, number * slots + slot.clamp_max(slots - 1), column)
    member = counts[:, :num_ranks].t() > 0
    rank, tokens = member.nonzero(as_tuple=True)
    position = (member.flatten().cumsum(0) - 1).view(num_ranks, num_tokens)
    visits = member.sum(0)
    rows = torch.empty(num_ranks, dtype=torch.int64, device=device)
    rows[torch.tensor(order, device=device)] = member.sum(1)
    return Plan(
        tokens=tokens,
        columns=columns.view(num_tokens, num_ranks + 1, slots)[tokens, rank],
        bags=position.t()[member.t()],
        starts=visits.cumsum(0) - visits,
        rows=rows,
    )
