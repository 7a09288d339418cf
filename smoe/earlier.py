"""Fields of a training's configuration that came later than others, and what runs from before them did.

For whoever reads a run of an earlier version: to go on with it, or to compare it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

EARLIER = {
    "beta2": 0.999,
    "init_std": 0.02,
    "position_init": "normal",
    "key_init": "normal",
    "skip_nonfinite": 0,
    "group_by_length": False,
}


def with_earlier(recorded: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A recorded configuration, and of the fields ``names`` that it lacks those of which it is known what it did."""
    return {name: EARLIER[name] for name in names if name in EARLIER} | dict(recorded)
