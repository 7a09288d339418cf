"""What ``auto`` comes to on a machine: which scale a run has, and which precision it computes in."""

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
        known, cuda = list(known), torch.cuda.is_available()
        scale = "paper" if cuda else "cpu"
        scale = scale if scale in known else known[0]
        reason = f"auto: CUDA device {torch.cuda.get_device_name()}" if cuda else "auto: no CUDA device"
    if scale not in known:
        raise ValueError(f"scale: {scale!r}, expected one of {', '.join([*known, 'auto'])}")
    return scale, reason


def resolve_precision(asked: str, device: torch.device) -> str:
    """``bf16`` or ``fp32``; ``auto`` is bf16 where the device has instructions for it."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
