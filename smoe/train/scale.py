"""Which scale a run has: the paper's sizes, or smaller ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def resolve_scale(scale: str, known: Iterable[str]) -> tuple[str, str]:
    """The scale's own name and why it is that one, e.g. ``("cpu", "auto: no CUDA device")``.

    ``auto`` is ``paper`` with a CUDA device, else ``cpu``; the first known one where that is not known.
    Raises ValueError for one that is not ``known``.
    """
    reason = "asked for"
    if scale == "auto":
        cuda = torch.cuda.is_available()
        known = list(known)
        wanted = "paper" if cuda else "cpu"
        scale = wanted if wanted in known or not known else known[0]
        reason = f"auto: CUDA device {torch.cuda.get_device_name()}" if cuda else "auto: no CUDA device"
    if scale not in known:
        raise ValueError(f"scale: {scale!r}, expected one of {', '.join([*known, 'auto'])}")
    return scale, reason
