"""Ranks that were started with different settings say so at once, all of them, instead of waiting for each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from .groups import ParallelGroups


def check_agreement(values: Mapping[str, Any], groups: ParallelGroups) -> None:
    """Every rank calls this with its own values; where they differ, all ranks raise the same error.

    One small all-gather of pickled objects (twice a round trip, under a millisecond within a machine): for the start of
    a run, and for k whenever it changes, rather than for every step. Within an expert-parallel group a k that differs
    is noticed without it, at the first pass (see ``smoe.parallel.dispatch``).

    Args:
        values: by field; anything that compares with ``==`` and can be pickled.

    Raises:
        ValueError: one line with every field that differs and its values by rank.
    """
    if groups.world_size == 1:
        return
    gathered: list[Any] = [None] * groups.world_size
    dist.all_gather_object(gathered, dict(values))
    raise_disagreement(gathered, range(groups.world_size))


def raise_disagreement(by_rank: list[Mapping[str, Any]], ranks: range) -> None:
    """A ValueError if the mappings are not all equal."""
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
