"""The fixed random router (SMoE-Dropout, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .linear import LinearRouter


class RandomRouter(LinearRouter):
    """SMoE-Dropout's router: a linear layer, randomly initialised, then fixed.

    Weight and bias are buffers, not parameters: saved and loaded with the model, never in an optimizer, never decayed.
    They stay the same float32 numbers whatever is done to the model: casts, ``torch.set_default_dtype``, the meta
    device and ``to_empty``. A checkpoint that holds them rounded to another dtype loads as what they were before.
    Gradients still reach ``x`` through the weights of the chosen experts. The bias is 0 unless a checkpoint says
    otherwise (the released code has one).
    """

    trained = False

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        self._kept: dict[str, Tensor] = {}  # on the CPU, while the buffers are on the meta device
        on_meta = self.weight.is_meta
        if on_meta:
            super().to_empty(device="cpu")
        super().reset_parameters(std)
        if on_meta:
            self.to("meta")

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomRouter:
        # .to(), .half(), .cuda(), .to_empty() and the like come through here: take the device from them alone.
        before = {name: (getattr(self, name), self._values(name)) for name in ("weight", "bias")}
        super()._apply(fn, recurse)
        for name, (old, values) in before.items():
            new = getattr(self, name)
            if new.dtype != torch.float32:
                new = torch.empty(new.shape, dtype=torch.float32, device=new.device)
            if new.is_meta and values is not None:
                self._kept[name] = values.to("cpu", copy=True)
            elif new is not old and values is not None:
                new.copy_(values)
            setattr(self, name, new)
        return self

    def _values(self, name: str) -> Tensor | None:
        """The numbers of a buffer, also while it is on the meta device, if they are known."""
        buffer = getattr(self, name)
        return self._kept.get(name) if buffer.is_meta else buffer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight", "bias"):
            loaded, own = state_dict.get(prefix + name), self._values(name)
            if isinstance(loaded, Tensor) and loaded.dtype != torch.float32:
                own = None if own is None or own.shape != loaded.shape else own.to(loaded.device)
                only_rounded = own is not None and torch.equal(own.to(loaded.dtype), loaded)
                state_dict[prefix + name] = own.clone() if only_rounded else loaded.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
