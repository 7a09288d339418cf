"""Ranks that were started with different settings all raise the same error at once, instead of waiting forever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from .groups import ParallelGroups


def check_agreement(values: Mapping[str, Any], groups: ParallelGroups) -> None:
    """Compares ``values`` over all ranks; if they differ, every rank raises the same error.

    Every rank must call it. It costs one all-gather of pickled objects, under a millisecond within a machine: call it
    at the start of a run and whenever k changes, not at every step. Within an expert-parallel group a different k is
    found without it, in the first forward pass (see ``smoe.parallel.dispatch``).

    Args:
        values: by field; values must be comparable with ``==`` and picklable.

    Raises:
        ValueError: one line with every field that differs and its values by rank.
    """
    if groups.world_size == 1:
        return
    gathered: list[Any] = [None] * groups.world_size
    dist.all_gather_object(gathered, dict(values))
    raise_disagreement(gathered, range(groups.world_size))


def raise_disagreement(by_rank: list[Mapping[str, Any]], ranks: range) -> None:
    """Raises a ValueError unless all mappings are equal; ``by_rank[i]`` is that of rank ``ranks[i]``."""
    missing = "(missing)"
    lines = []
    for field in dict.fromkeys(field for values in by_rank for field in values):
        seen: list[tuple[Any, list[int]]] = []
        for rank, values in zip(ranks, by_rank, strict=True):
            value = values.get(field, missing)
            same = next((holders for other, holders in seen if other == value), None)
            if same is None:
                seen.append((value, [rank]))
            else:
                same.append(rank)
        if len(seen) > 1:
            lines.append(f"{field} is " + ", ".join(f"{value!r} on {_ranks(holders)}" for value, holders in seen))
    if lines:
        raise ValueError(f"{'; '.join(lines)}; every rank must have the same")


def _ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
