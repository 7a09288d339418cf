"""Which tokens of a batch are padding, for each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

Key = str | int  # of an entry of a batch: the name in a mapping, the index in a tuple or list
Mask = Key | Mapping[str, Key] | Literal[False] | None


def mask_key(name: str, mask: Mask, model: nn.Module) -> Key | None:
    """Which entry of a batch masks the tokens of the layer ``name``; None: no entry does. See ``smoe.vote``."""
    if mask is False:
        return None
    if mask is None:
        two_parts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return "decoder_attention_mask" if two_parts and "decoder" in name.split(".") else "attention_mask"
    if not isinstance(mask, Mapping):
        return mask
    for beginning, key in mask.items():
        if name.startswith(beginning):
            return key
    raise ValueError(f"mask has no entry for layer {name}; its keys must be the beginnings of the layers' names")


def real_tokens(batch: Any, key: Key | None, chosen: bool) -> Tensor | None:
    """Which tokens (T,) of a batch are no padding; None: all. ``chosen``: the user has named the entry."""
    if key is None:
        return None
    if not chosen:
        found = batch.get(key) if isinstance(batch, Mapping) else None
        return found.reshape(-1) != 0 if isinstance(found, Tensor) and found.dim() == 2 else None
    try:
        return batch[key].reshape(-1) != 0
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"mask is {key!r}, but a batch ({type(batch).__name__}) has no such entry") from None
