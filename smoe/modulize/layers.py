"""Which layers of a model become SMoE layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

LayerNames = Literal["all", "early", "middle", "later", "every-2"]
LAYERS: tuple[str, ...] = get_args(LayerNames)

Layers = LayerNames | Sequence[int]  # the latter are indices from 0


def chosen_layers(layers: Layers, count: int) -> list[int]:
    """The indices, ascending, that ``layers`` selects from ``count`` layers.

    Args:
        layers: ``all``; ``early`` or ``later``, the first or last half; ``middle``, the half in between; ``every-2``,
            the 2nd, 4th, ... (Figure 5 (e)); or indices from 0.

    Raises:
        ValueError: ``layers`` is none of these, repeats an index, or selects nothing.
    """
    half = max(count // 2, 1)
    start = (count - half) // 2
    named = {
        "all": range(count),
        "early": range(half),
        "middle": range(start, start + half),
        "later": range(count - half, count),
        "every-2": range(1, count, 2),
    }
    if isinstance(layers, str):
        if layers not in named:
            raise ValueError(f"layers is {layers!r}; it must be one of {', '.join(LAYERS)} or a list of indices")
        chosen = list(named[layers])
    else:
        chosen = list(layers)
        wrong = [i for i in chosen if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count]
        if wrong or len(set(chosen)) < len(chosen):
            raise ValueError(f"layers is {chosen}; it must be different whole numbers from 0 to {count - 1}")
    if not chosen:
        raise ValueError(f"layers is {layers!r}, which selects none of {count} layers")
    return sorted(chosen)
