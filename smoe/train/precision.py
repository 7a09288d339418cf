"""Which precision a device computes in when the configuration leaves it open."""

from __future__ import annotations

import torch


def resolve_precision(asked: str, device: torch.device) -> str:
    """``bf16`` or ``fp32``; ``auto`` is bf16 where the device has instructions for it."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
