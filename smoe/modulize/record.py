"""What ``modulize``, ``slim`` and ``demodulize`` made of a model, as JSON."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..router import LearnedRouter, RandomRouter, UniformRouter
from .swap import Outlet

VERSION = 1

_ROUTERS = {RandomRouter: "random", LearnedRouter: "learned", UniformRouter: "uniform"}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The record of ``model``, or None if it has no SMoE layer and no slimmed MLP.

    ``layers``: the SMoE layers, by the name of the linear layer that each of them replaced. ``widths``: the hidden
    widths of dense MLPs that slimming made narrower, by the same names.
    """
    layers, widths = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Outlet):
            layer = module.mlp
            layers[name] = {
                "num_experts": layer.num_experts,
                "d_hidden": layer.d_hidden,
                "top_k": layer.top_k,
                "router": _ROUTERS[type(layer.router)],
                "score": layer.router.score,
                "output_scale": layer.output_scale,
                "dropout": layer.experts.dropout,
                "compute": layer.compute,
            }
        elif hasattr(module, "smoe_width"):
            widths[name] = module.smoe_width
    return {"version": VERSION, "layers": layers, "widths": widths} if layers or widths else None


def note_on_config(model: nn.Module) -> None:
    """Writes the record into a Hugging Face model's config, so that saving the config saves the record."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    record = describe(model)
    if record is not None:
        config.smoe = record
    elif hasattr(config, "smoe"):
        del config.smoe
