"""The fixed random router (SMoE-Dropout, section 3.2)."""

from __future__ import annotations

import torch

from .fixed import FixedBuffers
from .linear import LinearRouter


class RandomRouter(FixedBuffers, LinearRouter):
    """SMoE-Dropout's router: a linear layer, randomly initialised, then fixed.

    Weight and bias are buffers, not parameters: saved and loaded with the model, never in an optimizer, never decayed.
    They stay the same float32 numbers whatever is done to the model: casts, ``torch.set_default_dtype``, the meta
    device and ``to_empty``. Gradients still reach ``x`` through the weights of the chosen experts. The bias is 0 unless
    a checkpoint says otherwise (the released code has one).
    """

    trained = False
    fixed = {"weight": torch.float32, "bias": torch.float32}

    def reset_parameters(self, std: float = 0.02) -> None:
        device = self.weight.device
        if device.type == "meta":  # where the numbers would be lost
            self.to_empty(device="cpu")
        super().reset_parameters(std)
        self.to(device)
