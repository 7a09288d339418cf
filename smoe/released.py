"""The k schedules of the official release that differ from ours of the same names. Its linear ones are ours."""

from __future__ import annotations

import math


def released_k(step: int, total_steps: int, k_min: int, k_max: int, mode: str) -> int:
    """The number of activated experts at ``step`` by a mode ``released_*`` of ``smoe.schedule.k_at``.

    ``cosine``: k_max - (k_max - k_min) * cos(pi / 2 * step / total_steps), a quarter of a cosine: slow at first, fast
    at the end. ``exponential``: k_max - (k_max - k_min) * 0.99 ** n with n = step // (total_steps // 300): fast at
    first; it ends 5 % of the way below k_max. ``multistep``: 1, 2, 4, 8, 16 for a fifth of the steps each, raised to
    k_min and cut at k_max, so from 8 to 16 it stays at 8 for four fifths. ``*_decrease``: the same curves downwards.
    """
    step = min(step, total_steps)
    if mode.startswith("released_multistep"):
        stages = [1, 2, 4, 8, 16] if mode == "released_multistep" else [16, 8, 4, 2, 1]
        k = stages[min(len(stages) * step // total_steps, len(stages) - 1)]
    elif mode == "released_exponential":
        k = round((k_min - k_max) * 0.99 ** (step // max(total_steps // 300, 1))) + k_max
    elif mode == "released_cosine":
        k = round((k_min - k_max) * math.cos(math.pi * step / (2 * total_steps))) + k_max
    else:
        assert mode == "released_cosine_decrease"
        k = round((k_max - k_min) * math.cos(math.pi * step / (2 * total_steps))) + k_min
    return min(max(k, k_min), k_max)
