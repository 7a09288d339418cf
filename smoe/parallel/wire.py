"""The bytes that ranks send to each other: counted in a real model, and by formula.

All formulas give the bytes that one rank *sends to other ranks*, per layer and training step. T: tokens of one rank;
s: bytes of a number in a token's vector; W: ranks; E: ranks that share the experts; N: experts; k: chosen experts per
token; d: the model's width; P: parameters of a layer's experts.

==============  ====================================================================================================
data parallel   ``2 (W - 1) / W * 4 P``: a ring all-reduce of float32 gradients, independent of T, d and k
fastmoe         ``4 s d C``: one copy of the token per chosen expert on another rank, C of them, out and back, twice
ours            ``4 s d R`` and the routing: one copy of the token per other rank that it chose, R of them, out and
                back, twice; and an all-reduce of P / E gradients among the W / E ranks with the same experts
==============  ====================================================================================================

If k of N are chosen at random, C = T k (1 - 1/E) and R = T (E - 1) (1 - binom(N - N/E, k) / binom(N, k)). R is never
more than C; at k = N it is smaller by the factor N / E.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import Row, Sent
from .shard import parallelized_layers, unwrap_model


@contextmanager
def count_bytes(model: nn.Module) -> Iterator[dict[str, list[Sent]]]:
    """Within the block, records every message that this rank sends, by the name of the layer.

    ``sum(sent.bytes for sent in counted["layers.0.mlp"])`` are the bytes of one layer. The messages are those of
    ``smoe.parallel.dispatch``; gradients that DDP or ``sync_expert_gradients`` reduce are not counted.
    """
    layers = parallelized_layers(unwrap_model(model))
    counted: dict[str, list[Sent]] = {name: [] for name, _ in layers}
    for name, layer in layers:
        layer.dispatch.watchers.append(counted[name])
    try:
        yield counted
    finally:
        for name, layer in layers:
            layer.dispatch.watchers = [w for w in layer.dispatch.watchers if w is not counted[name]]


class WireBytes(NamedTuple):
    """The bytes that one rank sends per layer and training step, with each scheme (see this module)."""

    data_parallel: float
    fastmoe: float
    ours: float


def wire_bytes(
    tokens: int,
    d_model: int,
    top_k: int,
    num_experts: int,
    world_size: int,
    *,
    d_expert: int,
    expert_parallel: int | None = None,
    itemsize: int = 4,
    bias: bool = True,
    gated: bool = False,
    learned_weights: bool = True,
    rows: tuple[float, float] | None = None,
    copies: tuple[float, float] | None = None,
) -> WireBytes:
    """The bytes that one rank sends per layer and training step, by the formulas of this module.

    Args:
        tokens, d_model, top_k, num_experts, world_size: T (of this rank), d, k, N, W.
        d_expert: h, the hidden width of one expert.
        expert_parallel: E; None means W.
        itemsize: s, 4 for float32 or 2 under autocast to bfloat16.
        bias, gated: whether the experts have biases and gates.
        learned_weights: whether gradients of the routing weights are sent back. They are, unless the weights are
            constants (routers ``uniform`` and ``hash``, or the score ``sum``).
        rows: the (token, rank) pairs that this rank sends and receives, for exact numbers (see :func:`count_pairs`).
            None: the expected numbers if k of N are chosen at random.
        copies: the (token, expert) pairs likewise, for fastmoe.
    """
    e = world_size if expert_parallel is None else expert_parallel
    num_local = num_experts // e
    parameters = num_experts * ((3 if gated else 2) * d_expert * d_model)
    parameters += num_experts * (((2 if gated else 1) * d_expert) + d_model) if bias else 0
    if rows is None:
        hit = 1 - comb(num_experts - num_local, top_k) / comb(num_experts, top_k)
        rows = (tokens * (e - 1) * hit,) * 2
    if copies is None:
        copies = (tokens * top_k * (1 - 1 / e),) * 2
    row = Row(d_model, itemsize, min(top_k, num_local))
    returned = row.gradient_size if learned_weights else row.vector
    ours = 24 * (e - 1)  # the sizes message
    ours += rows[0] * (row.size + row.vector) + rows[1] * (row.vector + returned)
    between = all_reduce_bytes(4 * parameters / e, world_size // e)  # the ranks with the same experts
    return WireBytes(
        data_parallel=all_reduce_bytes(4 * parameters, world_size),
        fastmoe=8 * num_local * (e - 1) + 2 * sum(copies) * row.vector + between,
        ours=ours + between,
    )


def all_reduce_bytes(size: float, ranks: int) -> float:
    """The bytes that each of ``ranks`` sends in a ring all-reduce of ``size`` bytes (reduce-scatter, all-gather)."""
    return 2 * (ranks - 1) / ranks * size


def count_pairs(indices: Tensor, num_experts: int, expert_parallel: int, rank: int) -> tuple[int, int]:
    """The (token, rank) and the (token, expert) pairs that ``rank`` sends to other ranks, given its routing.

    The first number is ours: a token counts once per other rank that holds experts it chose. The second is fastmoe's:
    a token counts once per expert it chose on another rank.

    Args:
        indices: (T, k) int64, the chosen experts of the T tokens of ``rank``.
    """
    ranks = torch.div(indices, num_experts // expert_parallel, rounding_mode="floor")
    visited = torch.zeros(indices.shape[0], expert_parallel, dtype=torch.bool, device=indices.device)
    visited.scatter_(1, ranks, True)
    visited[:, rank] = False
    return int(visited.sum()), int((ranks != rank).sum())
