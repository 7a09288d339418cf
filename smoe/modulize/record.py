"""What ``modulize``, ``slim`` and ``demodulize`` made of a model, as JSON: written on saving, read on loading."""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from torch import nn

from ..compute import check_compute
from ..control import smoe_layers
from ..experts import Experts, check_divisible
from ..layer import SMoE, check_output_scale
from ..router import CLASSES, SCORES, Router, check_top_k
from ..wrappers import unwrap
from .swap import Outlet

VERSION = 2
_READABLE = (1, 2)  # 1 has no layers that were placed by hand

_KINDS = {router: kind for kind, router in CLASSES.items()}


@dataclass(frozen=True)
class Record:
    """The SMoE layers and slimmed MLPs of a model, by names in that model.

    layers: name of the linear layer that ``modulize`` replaced -> :func:`options_of` its SMoE layer.
    placed: name of an SMoE layer that the model's own code builds -> its options.
    widths: name of the last linear layer of a dense MLP that slimming made narrower -> its hidden width.
    """

    layers: dict[str, dict[str, Any]]
    placed: dict[str, dict[str, Any]]
    widths: dict[str, int]

    @property
    def is_empty(self) -> bool:
        return not (self.layers or self.placed or self.widths)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, "layers": self.layers, "placed": self.placed, "widths": self.widths}


def plain_name(name: str) -> str:
    """The name of a module or tensor without what ``torch.compile`` and checkpointing wrappers add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def describe(model: nn.Module) -> Record | None:
    """The record of ``model`` as it is now, or None if it has no SMoE layer and no slimmed MLP."""
    layers, widths, outlets = {}, {}, set()
    for name, module in model.named_modules():
        if isinstance(module, Outlet):
            layers[plain_name(name)] = options_of(module.mlp)
            outlets.add(module.mlp)
        elif hasattr(module, "smoe_width"):
            widths[plain_name(name)] = module.smoe_width
    placed = {plain_name(name): options_of(layer) for name, layer in smoe_layers(model) if layer not in outlets}
    return Record(layers, placed, widths) if layers or placed or widths else None


def options_of(layer: SMoE) -> dict[str, Any]:
    """What the weights of ``layer`` don't say about it: options of :class:`SMoE`."""
    return {
        "num_experts": layer.num_experts,
        "d_hidden": layer.d_hidden,
        "top_k": layer.top_k,
        "router": router_kind(layer),
        "score": unwrap(layer.router, Router)[0].score,
        "output_scale": layer.output_scale,
        "dropout": unwrap(layer.experts, Experts)[0].dropout,
        "compute": layer.compute,
    }


def router_kind(layer: SMoE) -> str:
    """Its name in ``smoe.router.ROUTERS``; the name of the class for a router of your own."""
    kind = type(unwrap(layer.router, Router)[0])
    return _KINDS.get(kind, kind.__name__)


def read_record(value: Any, where: str) -> Record | None:
    """The record in ``value``, which was read from the file ``where``; None if there is none.

    Raises:
        ValueError: it isn't one, or was written by another version; the message names the field.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: smoe is {short(value)}; it must be an object")
    version = value.get("version")
    if isinstance(version, bool) or version not in _READABLE:
        raise ValueError(f"{where}: smoe.version is {short(version)}; this smoe reads {_READABLE[0]} to {VERSION}")
    parts = {}
    for part in ("layers", "placed", "widths"):
        parts[part] = value.get(part, {})
        if not isinstance(parts[part], dict):
            raise ValueError(f"{where}: smoe.{part} is {short(parts[part])}; it must be an object")
    for name, width in parts["widths"].items():
        _check_size(width, f"{where}: smoe.widths[{short(name)}]")
    layers, placed = (
        {name: _read_options(entry, f"{where}: smoe.{part}[{short(name)}]") for name, entry in parts[part].items()}
        for part in ("layers", "placed")
    )
    return Record(layers, placed, parts["widths"])


def _read_options(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {short(entry)}; it must be an object")
    names = ("num_experts", "d_hidden", "top_k", "router", "score", "output_scale", "dropout", "compute")
    for name in names:
        if name not in entry:
            raise ValueError(f"{where} has no {name}")
    options = {name: entry[name] for name in names}
    for name in ("num_experts", "d_hidden", "top_k"):
        _check_size(options[name], f"{where}.{name}")
    for name in ("router", "score", "compute"):
        if not isinstance(options[name], str) or len(options[name]) > 100:
            raise ValueError(f"{where}.{name} is {short(options[name])}; it must be a name")
    if options["score"] not in SCORES:
        raise ValueError(f"{where}.score is {options['score']!r}; it must be one of {', '.join(SCORES)}")
    dropout, scale = options["dropout"], options["output_scale"]
    if not _is_number(dropout) or not 0 <= dropout <= 1:
        raise ValueError(f"{where}.dropout is {short(dropout)}; it must be a rate from 0 to 1")
    if scale not in ("k", "num_experts") and not _is_number(scale):
        raise ValueError(f"{where}.output_scale is {short(scale)}; it must be 'k', 'num_experts' or a positive number")
    try:
        check_divisible(options["d_hidden"], options["num_experts"])
        check_top_k(options["top_k"], options["num_experts"])
        check_output_scale(options["output_scale"])
        check_compute(options["compute"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return options


def _check_size(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{where} is {short(value)}; it must be a whole number from 1 to 2**31 - 1")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
