"""The fixed random router (SMoE-Dropout, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear import LinearRouter


class RandomRouter(LinearRouter):
    """SMoE-Dropout's router: a linear layer, randomly initialised, then fixed.

    Weight and bias are buffers, not parameters: saved and loaded with the model, never in an optimizer, never decayed.
    They stay float32: ``model.bfloat16()`` does not round them into another router. Gradients still reach ``x`` through
    the weights of the chosen experts. The bias is 0 unless a checkpoint says otherwise (the released code has one).
    """

    trained = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomRouter:
        # .to(), .half(), .cuda() and the like all come through here: take the device from them, not the dtype.
        before = {"weight": self.weight, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != torch.float32:
                setattr(self, name, old.to(new.device, torch.float32))
        return self
