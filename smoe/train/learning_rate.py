"""The learning rate of every step."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["cosine", "linear"]


def learning_rate_at(step: int, steps: int, learning_rate: float, warmup_steps: int, decay: Decay) -> float:
    """The learning rate of ``step`` (0 is the first of ``steps``): a pure function, so a resumed run recomputes it.

    ``cosine``: half a cosine from the full rate to 0 at ``steps`` (Transformer-XL's); the warm-up multiplies it and
    reaches 1 at step ``warmup_steps - 1``. ``linear``: BERT's, from 0 to the full rate at step ``warmup_steps``, then a
    straight line to 0 at ``steps``.
    """
    if decay == "cosine":
        warmup = min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
        return learning_rate * warmup * (1 + math.cos(math.pi * step / steps)) / 2
    if step < warmup_steps:
        return learning_rate * (step / warmup_steps)
    return learning_rate * max(0.0, (steps - step) / max(1, steps - warmup_steps))
