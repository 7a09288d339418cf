"""Buffers that are drawn once and then stay the same numbers, whatever is done to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """Buffers that keep their numbers and dtypes under casts, on the meta device and through ``to_empty``.

    A checkpoint that holds them rounded to another dtype loads as what they were before, if that is known here.
    """

    fixed: dict[str, torch.dtype]  # of the buffers, by name

    def _values(self, name: str) -> Tensor | None:
        """The numbers of a buffer, also while it is on the meta device, if they are known."""
        buffer = getattr(self, name)
        return self._kept().get(name) if buffer.is_meta else buffer

    def _kept(self) -> dict[str, Tensor]:
        """The numbers, on the CPU, while the buffers are on the meta device."""
        return self.__dict__.setdefault("_kept_values", {})

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedBuffers:
        # .to(), .half(), .cuda(), .to_empty() and the like come through here: take the device from them alone.
        before = {name: (getattr(self, name), self._values(name)) for name in self.fixed}
        super()._apply(fn, recurse)
        for name, (old, values) in before.items():
            new, dtype = getattr(self, name), self.fixed[name]
            if new.dtype != dtype:
                new = torch.empty(new.shape, dtype=dtype, device=new.device)
            if new.is_meta and values is not None:
                self._kept()[name] = values.to("cpu", copy=True)
            elif new is not old and values is not None:
                new.copy_(values)
            setattr(self, name, new)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, dtype in self.fixed.items():
            loaded, own = state_dict.get(prefix + name), self._values(name)
            if isinstance(loaded, Tensor) and loaded.dtype != dtype:
                own = None if own is None or own.shape != loaded.shape else own.to(loaded.device)
                only_rounded = own is not None and torch.equal(own.to(loaded.dtype), loaded)
                state_dict[prefix + name] = own.clone() if only_rounded else loaded.to(dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
