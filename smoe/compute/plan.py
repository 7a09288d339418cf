"""Which tokens sit where: the (token, expert) pairs of a routing in the order in which they are worked off."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The P (token, expert) pairs, expert after expert, and in the order of the tokens within an expert.

    An expert's pairs may be followed by padding: its last pair again and again, with weight 0, whose outputs nobody
    reads. (Not any other token: where that is NaN or infinite for this expert, 0 times it would be NaN.)

    rows: (P,) int64, the token of every pair.
    spans: one (start, end) an expert, its part of the pairs.
    position: (T, k) int64, the pairs of every token; of an absent slot P.
    absent: (T, k) bool, the slots without an expert; None if there are none.
    chunks: (first token, end token, one (start, end) an expert): the pairs of a chunk of tokens, and maybe some more.
    """

    rows: Tensor
    spans: list[tuple[int, int]]
    position: Tensor
    chunks: list[tuple[int, int, list[tuple[int, int]]]]
    absent: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return self.spans[-1][1]


def make_plan(indices: Tensor, num_experts: int, chunk: int, multiple: int = 1) -> Plan:
    """The plan of (T, k) indices, with T > 0; ``chunk`` tokens (the last fewer) make a chunk. An index of -1 is absent.

    Every expert's pairs, of a chunk as of all, are padded to a multiple of ``multiple``.
    Counting, not sorting: a sort of the pairs takes longer than the gathers it serves.
    """
    num_tokens = indices.shape[0]
    member = torch.zeros((num_experts + 1, num_tokens), dtype=torch.bool, device=indices.device)
    member.t().scatter_(1, indices.remainder(num_experts + 1), True)  # absent slots go to a row of their own
    member = member[:num_experts]
    ends = member.view(-1).cumsum(0).view(num_experts, num_tokens)
    edges = [*range(0, num_tokens, chunk), num_tokens]
    table = ends[:, [edge - 1 for edge in edges[1:]]].tolist()  # the one wait for the device
    starts = [0, *(row[-1] for row in table[:-1])]
    table = [[start, *row] for start, row in zip(starts, table, strict=True)]
    spans, shifts = [], []
    for row in table:
        first, end, padded = row[0], row[-1], spans[-1][1] if spans else 0
        shifts.append(padded - first)
        spans.append((padded, padded + _round_up(end - first, multiple)))
    ends += torch.tensor(shifts, device=indices.device).unsqueeze(1) - 1
    position = ends.t().gather(1, indices.clamp_min(0))
    chunks = []
    for c, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        parts = []
        for row, shift, span in zip(table, shifts, spans, strict=True):
            size = _round_up(row[c + 1] - row[c], multiple)
            start = min(row[c] + shift, span[1] - size)
            parts.append((start, start + size))
        chunks.append((first, end, parts))
    absent = None if table[-1][-1] == indices.numel() else indices < 0
    if absent is not None:
        position.masked_fill_(absent, spans[-1][1])
    token = torch.arange(num_tokens, device=indices.device).unsqueeze(1).expand_as(position)
    rows = token.new_zeros(spans[-1][1] + 1).scatter_(0, position.flatten(), token.flatten())[:-1]  # absent: the last
    if multiple > 1 and num_tokens > 1:
        counts = [row[-1] - row[0] for row in table]
        sizes = [n for count, (start, end) in zip(counts, spans, strict=True) for n in (count, end - start - count)]
        parts = rows.split(sizes)
        for own, padding in zip(parts[::2], parts[1::2], strict=True):
            if padding.shape[0]:
                padding.copy_(own[-1])
    return Plan(rows, spans, position, chunks, absent)


def local_position(plan: Plan, chunk: int, indices: Tensor) -> Tensor:
    """(tokens of the chunk, k): where the pairs of a chunk are once only they stand side by side, expert after expert.

    Absent slots point behind the last pair.
    """
    first, end, spans = plan.chunks[chunk]
    shifts, offset = [], 0
    for start, stop in spans:
        shifts.append(start - offset)
        offset += stop - start
    shift = torch.tensor(shifts, device=plan.position.device)
    local = plan.position[first:end] - shift[indices[first:end]]
    return local if plan.absent is None else local.masked_fill_(plan.absent[first:end], offset)


def dense_weights(weights: Tensor, indices: Tensor, num_experts: int, absent: bool) -> Tensor:
    """(T, N): the weight of every expert for every token, 0 where it isn't chosen; ``absent`` as in
    ``Routing``."""
    zeros = weights.new_zeros(weights.shape[0], num_experts)
    if not absent:
        return zeros.scatter(1, indices, weights)
    empty = indices < 0
    # Added, since an empty slot's zero must not overwrite the weight of the expert it is put with.
    return zeros.scatter_add(1, indices.masked_fill(empty, 0), weights.masked_fill(empty, 0))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
