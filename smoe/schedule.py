"""How many experts are activated at a step: the growing k of SMoE-Dropout, and the release's other schedules."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal, get_args

from .released import released_k

Mode = Literal[
    "linear",
    "linear_decrease",
    "cosine",
    "cosine_decrease",
    "exponential",
    "multistep",
    "multistep_decrease",
    "constant",
    "released_cosine",
    "released_cosine_decrease",
    "released_exponential",
    "released_multistep",
    "released_multistep_decrease",
    "random",
    "random_per_layer",
]
MODES: tuple[str, ...] = get_args(Mode)


def ks_at(
    step: int, total_steps: int, ranges: Sequence[tuple[int, int]], mode: Mode = "linear", *, seed: int = 0
) -> list[int]:
    """The number of activated experts of every SMoE layer at ``step``, in the model's order.

    The training loop, ``smoe.hf.TopKCallback``, logs, records and FLOPs all use this function.

    Args:
        ranges: (k_min, k_max) per layer.
        step, total_steps, mode, seed: see :func:`k_at`.
    """
    return [
        k_at(step, total_steps, k_min, k_max, mode, seed=seed, layer=layer)
        for layer, (k_min, k_max) in enumerate(ranges)
    ]


def k_at(
    step: int, total_steps: int, k_min: int, k_max: int, mode: Mode = "linear", *, seed: int = 0, layer: int = 0
) -> int:
    """The number of activated experts at ``step``: a pure function, so a resumed run recomputes it.

    Args:
        step: 0 for the first step. From ``total_steps`` on the last value holds (the random modes go on drawing).
        mode: ``linear``: round((k_max - k_min) * step / total_steps) + k_min, the paper's;
            ``cosine``: half a cosine from k_min to k_max; ``exponential``: k_min * (k_max / k_min) ** (step / total);
            ``multistep``: k_min, 2 k_min, 4 k_min, ... k_max for equally many steps each; ``*_decrease``: the same from
            k_max down to k_min; ``constant``: k_max; ``random``: uniform in k_min..k_max, drawn from (seed, step), the
            same for all layers; ``random_per_layer``: drawn from (seed, step, layer).
            ``released_*``: the official release's curves of these names, which are others (``smoe/released.py``).
        layer: the index of the SMoE layer, from 0; only ``random_per_layer`` depends on it.

    Raises:
        ValueError: the mode is not in ``MODES``; a number is not whole; or not 1 <= k_min <= k_max, step >= 0 and
            total_steps >= 1.
    """
    if mode not in MODES:
        raise ValueError(f"k schedule mode is {mode!r}; it must be one of {', '.join(MODES)}")
    for name, value in (("step", step), ("total_steps", total_steps), ("k_min", k_min), ("k_max", k_max)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if not 1 <= k_min <= k_max:
        raise ValueError(f"k_min is {k_min} and k_max is {k_max}; it must be 1 <= k_min <= k_max")
    if step < 0 or total_steps < 1:
        raise ValueError(f"step is {step} of {total_steps}; steps count from 0 and total_steps from 1")
    if mode == "constant":
        return k_max
    if mode in ("random", "random_per_layer"):
        return random.Random(f"{seed}/{step}/{layer if mode == 'random_per_layer' else 0}").randint(k_min, k_max)
    if mode.startswith("released"):
        return released_k(step, total_steps, k_min, k_max, mode)
    if mode.startswith("multistep"):
        stages = [k_min]
        while stages[-1] < k_max:
            stages.append(min(2 * stages[-1], k_max))
        if mode == "multistep_decrease":
            stages.reverse()
        # In whole numbers, because a rounded fraction could end a stage one step early or late.
        return stages[min(step * len(stages) // total_steps, len(stages) - 1)]
    t = min(step / total_steps, 1.0)
    if mode.endswith("_decrease"):
        mode, t = mode.removesuffix("_decrease"), 1.0 - t
    if mode == "linear":
        return round((k_max - k_min) * t) + k_min
    if mode == "cosine":
        return round((k_max - k_min) * (1 - math.cos(math.pi * t)) / 2) + k_min
    assert mode == "exponential"
    return round(k_min * (k_max / k_min) ** t)
