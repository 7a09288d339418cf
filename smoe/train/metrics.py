"""What a split is measured by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number per split and k, as tables and plots name it.

    Args:
        key: its name in records. title, unit: its name and unit in tables and on axes.
        direction: which of two values is better.
        nats: whether it is the mean loss in bits (loss / ln 2): the training loss is then logged in its unit too.
    """

    key: str
    title: str
    unit: str
    direction: Literal["lower", "higher"]
    nats: bool = False

    def better(self, value: float, than: float | None) -> bool:
        """Whether ``value`` is strictly better than ``than``; any number is better than None."""
        if than is None:
            return not math.isnan(value)
        return value < than if self.direction == "lower" else value > than

    def shown(self, values: Mapping[str, float]) -> str:
        """E.g. ``BPC 1.1486``."""
        return f"{self.title} {values[self.key]:.4f}"
