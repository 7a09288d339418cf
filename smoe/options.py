"""Fields of a configuration that say what they are and what they may be."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

_BOUNDS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


def option(default: Any, note: str, **bounds: float) -> Any:
    """A field with its line of ``--help`` and the bounds of its value: ``at_least``, ``at_most``, ``above``, ``below``.

    A field that can be null has no bound on null. A subclass that changes a default need not repeat the rest.
    """
    whole = isinstance(default, int)
    return dataclasses.field(default=default, metadata={"help": note, "whole": whole, **bounds})


def required(note: str, **kwargs: Any) -> Any:
    """A field without a default, with its line of ``--help``."""
    return dataclasses.field(metadata={"help": note}, **kwargs)


def field_metadata(config_class: type) -> dict[str, dict[str, Any]]:
    """What :func:`option` says of each field that it made, in ``config_class`` or a class that this one extends."""
    found: dict[str, dict[str, Any]] = {}
    for base in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        for field in dataclasses.fields(base):
            found[field.name] = {**found.get(field.name, {}), **field.metadata}
    return found


def check_bounds(config: Any) -> None:
    """A ValueError for the first field of ``config`` that is outside its bounds; null has none."""
    for name, known in field_metadata(type(config)).items():
        value, bounds = getattr(config, name), known.keys() & _BOUNDS
        if not bounds or value is None:
            continue
        kind = "a whole number" if known["whole"] else "a number"
        fits = not isinstance(value, bool) and isinstance(value, int if known["whole"] else (int, float))
        if not fits or not all(_BOUNDS[words](value, known[words]) for words in bounds):
            allowed = " and ".join(f"{words.replace('_', ' ')} {known[words]}" for words in sorted(bounds))
            raise ValueError(f"{name} is {value!r}; it must be {kind} {allowed}")
