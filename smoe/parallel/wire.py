"""What moves over the wire: counted while it moves, and by formula.

Everything is per rank, per layer and training step, in bytes *sent to other ranks*; T is the tokens of one rank, s the
bytes of a number in them, W the ranks, E those among them that share the experts, N the experts, k those a token
chooses, d the model's width, P the experts' parameters of a layer.

==============  ====================================================================================================
data parallel   ``2 (W - 1) / W * 4 P``: a ring all-reduce of float32 gradients, whatever T, d and k are
fastmoe         ``4 s d C``: a copy of the token for each of its C choices on other ranks, out and back, twice
ours            ``4 s d R`` and the routing beside it: a copy for each of its R other ranks, out and back, twice;
                and among the W / E ranks with the same experts an all-reduce of P / E of the gradients
==============  ====================================================================================================

With k of N chosen at random, C = T k (1 - 1/E) and R = T (E - 1) (1 - binom(N - N/E, k) / binom(N, k)): at k = N that
is N / E times less than C, and never more than C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import Row, Sent
from .shard import bare, spread_layers


@contextmanager
def count_bytes(model: nn.Module) -> Iterator[dict[str, list[Sent]]]:
    """Within the block, what this rank sends to others is noted by layer, message after message.

    ``sum(sent.bytes for sent in counted["layers.0.mlp"])``; the messages are those of ``smoe.parallel.dispatch``.
    Gradients that DDP or ``sync_expert_gradients`` reduce are not in it.
    """
    layers = spread_layers(bare(model))
    counted: dict[str, list[Sent]] = {name: [] for name, _ in layers}
    for name, layer in layers:
        layer.dispatch.watchers.append(counted[name])
    try:
        yield counted
    finally:
        for name, layer in layers:
            layer.dispatch.watchers = [w for w in layer.dispatch.watchers if w is not counted[name]]


class WireBytes(NamedTuple):
    """Bytes that one rank sends, per layer and training step, by each scheme."""

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
    """Bytes sent per rank, layer and training step; see the formulas of this module.

    Args:
        tokens, d_model, top_k, num_experts, world_size: T (of this rank), d, k, N, W.
        d_expert: h, the hidden width of an expert.
        expert_parallel: E; None means W.
        itemsize: s, bytes of a number of a token on the wire: 4, or 2 under autocast to bfloat16.
        bias, gated: of the experts.
        learned_weights: whether gradients of the routing weights travel back: yes, unless they are constants
            (routers ``uniform`` and ``hash``, or the score ``sum``).
        rows: (token, rank) pairs that this rank sends and receives (see :func:`count_pairs`): exact for a routing.
            None: the expected number with k of N chosen at random.
        copies: the same in (token, expert) pairs, for fastmoe.
    """
    e = world_size if expert_parallel is None else expert_parallel
    share = num_experts // e
    parameters = num_experts * ((3 if gated else 2) * d_expert * d_model)
    parameters += num_experts * (((2 if gated else 1) * d_expert) + d_model) if bias else 0
    if rows is None:
        hit = 1 - comb(num_experts - share, top_k) / comb(num_experts, top_k)
        rows = (tokens * (e - 1) * hit,) * 2
    if copies is None:
        copies = (tokens * top_k * (1 - 1 / e),) * 2
    row = Row(d_model, itemsize, min(top_k, share))
    returned = row.size_back if learned_weights else row.vector
    ours = 24 * (e - 1)  # the sizes message
    ours += rows[0] * (row.size + row.vector) + rows[1] * (row.vector + returned)
    between = all_reduce_bytes(4 * parameters / e, world_size // e)  # the ranks with the same experts
    return WireBytes(
        data_parallel=all_reduce_bytes(4 * parameters, world_size),
        fastmoe=8 * share * (e - 1) + 2 * sum(copies) * row.vector + between,
        ours=ours + between,
    )


def all_reduce_bytes(size: float, ranks: int) -> float:
    """What each of ``ranks`` sends to sum ``size`` bytes over a ring: a scatter of sums, then a gather."""
    return 2 * (ranks - 1) / ranks * size


def count_pairs(indices: Tensor, num_experts: int, expert_parallel: int, rank: int) -> tuple[int, int]:
    """What (T, k) chosen experts of ``rank`` make it send: (token, rank) pairs and (token, expert) pairs elsewhere.

    The first is ours: a token counts once for each *other* rank that has an expert it chose. The second is a copy per
    expert.
    """
    ranks = torch.div(indices, num_experts // expert_parallel, rounding_mode="floor")
    visited = torch.zeros(indices.shape[0], expert_parallel, dtype=torch.bool, device=indices.device)
    visited.scatter_(1, ranks, True)
    visited[:, rank] = False
    return int(visited.sum()), int((ranks != rank).sum())
