"""Transformers' own ``from_pretrained`` loads modulized models right, or fails.

A checkpoint with SMoE layers says so twice. ``quantization_config`` in its ``config.json`` names the method ``smoe``:
Transformers lets whoever has registered for a method change a model before its weights arrive, and here the MLPs become
SMoE layers. Where nobody has, Transformers only warns and draws the MLPs at random; so for each
SMoE layer the file has a weight of the wrong shape (``hook.wrong_weights``), which every version refuses to load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .convert import place
from .find import find_mlps
from .folder import CONFIG, Header, brief, read_headers
from .hook import METHOD, NO_RECORD
from .narrow import narrow_mlp
from .record import Record, plain_name, read_record
from .swap import empty_layer


@register_quantization_config(METHOD)
class SMoEConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint with SMoE layers. The record itself is under ``smoe``."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = METHOD


@register_quantizer(METHOD)
class SMoELoader(HfQuantizer):
    """Exchanges the MLPs of a model on the meta device as its record says, before Transformers loads the weights."""

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        record = read_record(getattr(model.config, "smoe", None), CONFIG)
        if record is None or record.is_empty:
            raise ValueError(NO_RECORD)
        if record.placed:
            raise ValueError(
                f"{CONFIG}: {brief(next(iter(record.placed)))} is an SMoE layer that {type(model).__name__} has no "
                "place for; use smoe.from_pretrained(path, model=...)"
            )
        sources = exchange_mlps(model, record)
        if checkpoint_files is not None:  # None: the caller gave a state dict
            _check_saved(model, sources, read_headers([Path(file) for file in checkpoint_files]))

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        # From here on it is a modulized model like any other: nothing of it is quantised.
        self.remove_quantization_config(model)
        vars(model.config).pop("smoe", None)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def exchange_mlps(model: nn.Module, record: Record) -> dict[str, str]:
    """Does to ``model``, on the meta device, what ``record`` says; the names of its SMoE layers -> those in the record.

    Where ``model`` is the base of the saved model, or has a head that the saved one lacked, the names differ by the
    name of the base (``model.``).

    Raises:
        ValueError: none of the recorded MLPs is in ``model``.
    """
    with _numbers_instead_of_meta(model):
        found = {plain_name(mlp.name): mlp for mlp in find_mlps(model)}
    known = record.layers.keys() | record.widths.keys()
    names = {name: source for name in found if (source := _saved_name(name, known, model.base_model_prefix))}
    if not names:
        raise ValueError(
            f"the record has an MLP at {brief(next(iter(known)))}, but {type(model).__name__} has them at "
            f"{', '.join(map(brief, list(found)[:3]))}"
        )
    plan = []
    for name, source in names.items():
        if source in record.widths:
            narrow_mlp(found[name], record.widths[source])
        else:
            plan.append((found[name], partial(empty_layer, found[name], record.layers[source])))
    if plan:
        place(model, plan)
    layers = {name: source for name, source in names.items() if source in record.layers}
    ignored = {rf"{re.escape(name)}\.weight$" for name in layers}  # hook.wrong_weights
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
    return layers


def _check_saved(model: nn.Module, layers: dict[str, str], saved: dict[str, Header]) -> None:
    """A ValueError unless the files hold all of every SMoE layer: Transformers would leave what is missing unset.

    layers: as :func:`exchange_mlps` returns them.
    """
    saved = {plain_name(name): header for name, header in saved.items()}
    for name, source in layers.items():
        for key, tensor in model.get_submodule(name).state_dict().items():
            header = saved.get(f"{source}.{key}")
            if header is None or header.shape != tuple(tensor.shape):
                raise ValueError(
                    f"the files hold no {brief(f'{source}.{key}')} of shape {tuple(tensor.shape)}, which the record "
                    "says they do"
                )


def _saved_name(name: str, known: set[str], base: str) -> str | None:
    """What the MLP ``name`` is called in the record; None if it is not there."""
    return next((n for n in (name, f"{base}.{name}", name.removeprefix(f"{base}.")) if n in known), None)


@contextmanager
def _numbers_instead_of_meta(model: nn.Module) -> Iterator[None]:
    """Within the block the tensors on the meta device are random ones that take no memory to speak of.

    The trials that find an MLP run parts of the model, norms for instance, though never its linear layers.
    """
    places = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_meta
    ]
    dtype, numbers = torch.get_default_dtype(), {}
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            for tensors, name, tensor in places:
                if id(tensor) not in numbers:
                    numbers[id(tensor)] = _random(tensor)
                tensors[name] = numbers[id(tensor)]
            yield
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor
        torch.set_default_dtype(dtype)


def _random(tensor: Tensor) -> Tensor:
    """Random numbers in the shape of ``tensor``. Of a parameter element (i, j) is number i + j, to save memory."""
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        return nn.Parameter(torch.randn(sum(tensor.shape) + 1).as_strided(tensor.shape, (1,) * tensor.dim()))
    return torch.randn(tensor.shape) if tensor.is_floating_point() else torch.zeros(tensor.shape, dtype=tensor.dtype)
