"""What a model is measured by, in trainings and in reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number per split and k.

    Args:
        key: its name in records. title, unit: as tables and axes name it.
        direction: which of two values is better.
        nats: whether it is the mean loss in bits (loss / ln 2): the training loss is then logged in its unit too.
    """

    key: str
    title: str
    unit: str
    direction: Literal["lower", "higher"]
    nats: bool = False

    def better(self, value: float, than: float | None) -> bool:
        """Whether ``value`` is finite and strictly better than ``than``; any number is better than None."""
        if than is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < than if self.direction == "lower" else value > than

    def shown(self, values: Mapping[str, float]) -> str:
        """E.g. ``BPC 1.1486``."""
        return f"{self.title} {values[self.key]:.4f}"

    @property
    def shown_as(self) -> dict[str, str]:
        """What a record says of it, so that a report can show it: ``title``, ``unit`` and ``direction``."""
        return {"title": self.title, "unit": self.unit, "direction": self.direction}


BPC = Metric("bpc", "BPC", "bits per byte", "lower", nats=True)
BITS_PER_MASKED_TOKEN = Metric(
    "bits_per_masked_token", "Bits per masked token", "bits per masked token", "lower", nats=True
)
