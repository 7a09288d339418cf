"""Which layers of a model become SMoE layers, and what is different from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ..control import one_per_layer

LayerNames = Literal["all", "early", "middle", "later", "every-2"]
LAYERS: tuple[str, ...] = get_args(LayerNames)

Layers = LayerNames | Sequence[int]  # the latter are indices from 0
PerLayer = int | Sequence[int] | Mapping[str, int]  # one for all layers, one each in order, one each by name


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


def per_layer(option: str, value: PerLayer | None, names: Sequence[str]) -> list[Any]:
    """The ``value`` of an option for each of the layers ``names``; see ``modulize``.

    A key of a mapping may be a name, the SMoE layer's name that it becomes, or whole parts of them ("layers.1").

    Raises:
        ValueError: a list has not one value per layer, or the keys of a mapping don't name each layer once.
    """
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, one in value.items():
            fitting = [name for name in names if f".{key}." in f".{name}.mlp."]
            if len(fitting) != 1 or fitting[0] in found:
                why = "which names no layer" if not fitting else f"which names {fitting[0]} among {len(fitting)}"
                why = f"which names {fitting[0]} again" if len(fitting) == 1 else why
                raise ValueError(f"{option} has the key {key!r}, {why}; the layers are {', '.join(names)}")
            found[fitting[0]] = one
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"{option} has no entry for {missing[0]}; it must have one for each of {len(names)} layers"
            )
        return [found[name] for name in names]
    return one_per_layer(option, value, len(names), f"there are {len(names)} layers")
