"""The (token, expert) pairs of a routing, grouped by expert: which rows every expert computes, and in which order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .products import onednn_float32

# Bytes that the outputs of the pairs of one chunk of tokens may take. A chunk that stays in the cache is summed faster,
# a larger one makes larger matrix products.
CHUNK_BYTES = 24 << 20
# On a CPU, oneDNN (which computes products of 16 bits, and on some processors those of 32) compiles a kernel for every
# new number of rows. That takes up to several milliseconds, more than the product itself, and routing makes new numbers
# at every step. So the rows of an expert are padded to a multiple of PADDING, or of about 1/16 of what an expert gets
# if that is more: the numbers soon repeat, and all kernels fit into oneDNN's cache of 1024. It adds about 3 % of rows.
PADDING = 64
# The multiple where an expert gets fewer than PADDING rows: there are few numbers then, and padding would cost more.
FEW_PADDING = 8

Span = tuple[int, int]  # (start, end)


class Chunk(NamedTuple):
    """Tokens ``start`` to ``end`` - 1; ``spans``: for every expert, their pairs, and maybe some more."""

    start: int
    end: int
    spans: list[Span]


class Grouping(NamedTuple):
    """The P pairs, expert after expert, and in the order of the tokens within an expert.

    An expert's pairs may be followed by padding: its last pair again and again, with weight 0, whose outputs nobody
    reads. (Not any other token: where that is NaN or infinite for this expert, 0 times it would be NaN.)

    tokens: (P,) int64, the token of every pair.
    spans: for every expert, its pairs.
    position: (T, k) int64, the pairs of every token; P for an absent slot.
    chunks: the tokens in pieces.
    absent: (T, k) bool, the slots without an expert; None if there are none.
    """

    tokens: Tensor
    spans: list[Span]
    position: Tensor
    chunks: list[Chunk]
    absent: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return self.spans[-1][1]

    @property
    def longest(self) -> int:
        """The most pairs that one expert has."""
        return max(end - start for start, end in self.spans)

    def position_in(self, chunk: Chunk, indices: Tensor) -> Tensor:
        """(tokens of the chunk, k): ``position`` where only the chunk's spans stand side by side, expert after expert.

        Absent slots point behind the last pair.
        """
        shifts, offset = [], 0
        for start, end in chunk.spans:
            shifts.append(start - offset)
            offset += end - start
        tokens = slice(chunk.start, chunk.end)
        local = self.position[tokens] - torch.tensor(shifts, device=indices.device)[indices[tokens]]
        return local if self.absent is None else local.masked_fill_(self.absent[tokens], offset)

    def by_pair(self, weights: Tensor) -> Tensor:
        """Weights (T, k) -> (P, 1), 0 for padding."""
        out = weights.new_zeros(self.num_pairs + 1)
        out[self.position.view(-1)] = weights.reshape(-1)
        return out[:-1].unsqueeze(1)

    def without_absent(self, weights: Tensor) -> Tensor:
        """Weights (T, k) with 0 for absent slots."""
        return weights if self.absent is None else weights.masked_fill(self.absent, 0)


def group(x: Tensor, indices: Tensor, num_experts: int) -> Grouping:
    """The grouping of x (T, d), T > 0, by indices (T, k), where -1 is an absent slot.

    The pairs of every expert, in a chunk as in total, are padded to a multiple of ``row_multiple``. The pairs are
    counted, not sorted: a sort takes longer than the gathers that it serves.
    """
    num_tokens = x.shape[0]
    member = torch.zeros((num_experts + 1, num_tokens), dtype=torch.bool, device=indices.device)
    member.t().scatter_(1, indices.remainder(num_experts + 1), True)  # absent slots go to a row of their own
    ends = member[:num_experts].view(-1).cumsum(0).view(num_experts, num_tokens)
    # Without absent slots; elsewhere all slots, because to look would be to wait for the device.
    num_pairs = int(ends[-1, -1]) if ends.device.type == "cpu" else indices.numel()
    multiple = row_multiple(x, num_pairs, num_experts)
    num_chunks = max(1, -(-num_pairs * x.shape[1] * x.element_size() // CHUNK_BYTES))
    chunk_size = -(-num_tokens // num_chunks)
    edges = [*range(0, num_tokens, chunk_size), num_tokens]
    table = ends[:, [edge - 1 for edge in edges[1:]]].tolist()  # the only wait for the device
    # For every expert, the first of its pairs and the last of each chunk, without padding.
    table = [[start, *row] for start, row in zip([0, *(row[-1] for row in table)], table, strict=False)]
    spans, shifts, padded = [], [], 0
    for row in table:
        shifts.append(padded - row[0])
        spans.append((padded, padded := padded + _round_up(row[-1] - row[0], multiple)))
    ends += torch.tensor(shifts, device=indices.device).unsqueeze(1) - 1
    position = ends.t().gather(1, indices.clamp_min(0))
    chunks = []
    for c, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        chunk = Chunk(first, end, [])
        for row, shift, (_, last) in zip(table, shifts, spans, strict=True):
            size = _round_up(row[c + 1] - row[c], multiple)
            start = min(row[c] + shift, last - size)
            chunk.spans.append((start, start + size))
        chunks.append(chunk)
    absent = None if table[-1][-1] == indices.numel() else indices < 0
    if absent is not None:
        position.masked_fill_(absent, padded)
    token = torch.arange(num_tokens, device=indices.device).unsqueeze(1).expand_as(position)
    tokens = token.new_zeros(padded + 1).scatter_(0, position.flatten(), token.flatten())[:-1]  # absent: the last
    if multiple > 1 and num_tokens > 1:
        for row, (start, end) in zip(table, spans, strict=True):
            own_end = start + row[-1] - row[0]
            if own_end < end:
                tokens[own_end:end] = tokens[own_end - 1]
    return Grouping(tokens, spans, position, chunks, absent)


def row_multiple(x: Tensor, num_pairs: int, num_experts: int) -> int:
    """The number of which the rows of an expert are padded to a multiple (see ``PADDING``)."""
    most = most_padding(x, num_pairs, num_experts)
    return min(most, FEW_PADDING) if num_pairs < PADDING * num_experts else most


def most_padding(x: Tensor, num_pairs: int, num_experts: int) -> int:
    """At least ``row_multiple``; without a branch on num_pairs, which torch.compile may have as a symbol."""
    if x.device.type == "cpu" and (x.element_size() == 2 or x.dtype == torch.float32 and onednn_float32()):
        return PADDING * max(1, num_pairs // (16 * PADDING * num_experts))
    return 1


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
