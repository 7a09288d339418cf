"""Which token goes to which ranks in one pass of a layer, as rows of the buffers that the ranks exchange."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DispatchPlan(NamedTuple):
    """The P (token, rank) pairs of one rank's T tokens: one pair for each rank that holds experts the token chose.

    Pairs are ordered by rank, this rank first and the others ascending; within a rank by token.

    tokens: (P,) int64, the token of each pair.
    columns: (P, slots) int64, which of the token's k choices are on that rank; -1 in unused slots.
    bags: (P,) int64, the numbers of the pairs ordered by token.
    starts: (T,) int64, where each token's pairs begin in ``bags``.
    rows: (E,) int64, the number of pairs of each rank, ordered by rank.
    """

    tokens: Tensor
    columns: Tensor
    bags: Tensor
    starts: Tensor
    rows: Tensor


def make_plan(indices: Tensor, num_local: int, num_ranks: int, rank: int) -> DispatchPlan:
    """The plan of one rank.

    Args:
        indices: (T, k) int64, the chosen experts; -1 is an empty slot.
        num_local: experts per rank, N / E; rank r holds ``r * num_local .. (r + 1) * num_local - 1``.
        num_ranks: E.
        rank: this rank's number in the expert-parallel group.
    """
    num_tokens, k = indices.shape
    slots, device = min(k, num_local), indices.device
    # Positions count the ranks in the order of the buffers: this rank is 0. Empty slots get a position past the last.
    order = [rank, *(other for other in range(num_ranks) if other != rank)]
    position_of = torch.empty(num_ranks + 1, dtype=torch.int64)
    position_of[order], position_of[num_ranks] = torch.arange(num_ranks), num_ranks
    position = position_of.to(device)[torch.div(indices, num_local, rounding_mode="floor").remainder(num_ranks + 1)]
    # (T, E + 1): how many choices each token has at each position.
    counts = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(1, position, torch.ones_like(position))
    position, column = position.sort(dim=1, stable=True)
    slot = torch.arange(k, device=device) - (counts.cumsum(1) - counts).gather(1, position)
    columns = torch.full((num_tokens, (num_ranks + 1) * slots), -1, dtype=torch.int64, device=device)
    columns.scatter_(1, position * slots + slot.clamp_max(slots - 1), column)
    chosen = counts[:, :num_ranks].t() > 0  # (E, T)
    destination, tokens = chosen.nonzero(as_tuple=True)
    pair = (chosen.flatten().cumsum(0) - 1).view(num_ranks, num_tokens)
    pairs_per_token = chosen.sum(0)
    rows = torch.empty(num_ranks, dtype=torch.int64, device=device)
    rows[torch.tensor(order, device=device)] = chosen.sum(1)
    return DispatchPlan(
        tokens=tokens,
        columns=columns.view(num_tokens, num_ranks + 1, slots)[tokens, destination],
        bags=pair.t()[chosen.t()],
        starts=pairs_per_token.cumsum(0) - pairs_per_token,
        rows=rows,
    )
