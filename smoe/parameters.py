"""Parameters: how many, and in groups for optimizers, which can't tell stacked biases and experts from matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from .control import smoe_layers
from .experts import Experts
from .router import Router

# The later kind wins where layers share a parameter.
_KINDS = ("matrices", "experts", "others", "undecayed")


def parameter_counts(model: nn.Module, ks: Iterable[int] = ()) -> dict[str, Any]:
    """Number of parameters, each one once: ``total``, ``trainable``, ``experts`` (of SMoE layers), ``rest``.

    ``active_per_k``: those that one token passes through with k activated experts.
    """
    sizes = [(sum(p.numel() for p in layer.experts.parameters()), layer.num_experts) for _, layer in smoe_layers(model)]
    total, experts = sum(p.numel() for p in model.parameters()), sum(size for size, _ in sizes)
    return {
        "total": total,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "experts": experts,
        "rest": total - experts,
        "active_per_k": {str(k): total - experts + sum(size // n * min(k, n) for size, n in sizes) for k in ks},
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` as groups for an optimizer, each under its ``name``:

    - ``matrices``: 2-D weights of linear layers.
    - ``experts``: 3-D stacks ``(N, h, d)`` of N matrices each, weights of SMoE layers.
    - ``others``: embeddings, convolutions and whatever else is decayed but no matrix.
    - ``undecayed``: biases, norms and routers, with weight decay 0.

    By the number of dimensions alone, the usual rule, an optimizer would decay the experts' biases ``(N, h)`` and
    ``(N, d)`` as if they were matrices. Groups without parameters are left out.

    Args:
        weight_decay: of the first three groups.

    Raises:
        ValueError: weight_decay is no number of at least 0.
    """
    number = isinstance(weight_decay, (int, float)) and not isinstance(weight_decay, bool)
    if not number or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay!r}; it must be a number of at least 0")
    kinds: dict[nn.Parameter, str] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kind = _kind(module, name, parameter)
                kinds[parameter] = max(kind, kinds.get(parameter, kind), key=_KINDS.index)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        kinds |= {parameter: "undecayed" for parameter in router.parameters() if parameter in kinds}
    groups = []
    for kind in _KINDS:
        parameters = [parameter for parameter, own in kinds.items() if own == kind]
        decay = 0.0 if kind == "undecayed" else weight_decay
        if parameters:
            groups.append({"name": kind, "params": parameters, "weight_decay": decay})
    return groups


def _kind(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    is_norm = "norm" in type(module).__name__.lower()
    if parameter.ndim < 2 or name.endswith("bias") or is_norm:
        return "undecayed"
    if isinstance(module, Experts):
        return "experts"
    if parameter.ndim > 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "others"
    return "matrices"
