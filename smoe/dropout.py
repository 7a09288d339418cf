"""Dropout that is fast on a CPU, where PyTorch's own draws one number per element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout``, several times faster on a CPU and the same elsewhere.

    The draws come from PyTorch's global generator, but are not those of ``nn.Dropout``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        return dropout(x, self.p) if self.training and self.p > 0 else x


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element 0 with probability ``p``, the others divided by 1 - p.

    On a CPU p is rounded to a multiple of 2^-16, in the division too, so that the expectation is exact.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or x.device.type != "cpu" or _dropped(p) in (0, 65536):
        return F.dropout(x, p)
    return x * keep_mask(x.shape, p, x).mul_(kept_scale(p))


def keep_mask(shape: torch.Size, p: float, like: Tensor) -> Tensor:
    """A new tensor like ``like`` of this shape: 0 with probability ``p``, rounded to a multiple of 2^-16, else 1."""
    dropped = _dropped(p)
    if like.device.type != "cpu" or dropped in (0, 65536):
        return like.new_empty(shape).bernoulli_(1 - dropped / 65536)
    # One 64-bit draw serves four elements.
    draws = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: shape.numel()].view(shape)
    first_kept = dropped - 32768
    # 0 or 1 by integer arithmetic, which is vectorised; a comparison gives booleans, which are slow to multiply with.
    return keep.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1).to(like.dtype)


def kept_scale(p: float) -> float:
    """What dropout multiplies the kept elements with, 1 / (1 - p) for p as rounded; 1 if all are dropped."""
    dropped = _dropped(p)
    return 65536 / (65536 - dropped) if dropped < 65536 else 1.0


def _dropped(p: float) -> int:
    """How many of the 65536 values of a 16-bit integer are dropped."""
    return round(p * 65536)
