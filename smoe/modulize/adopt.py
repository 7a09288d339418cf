"""Trained SMoE layers of a model's own code -> the same model as Transformers builds it, modulized."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..activation import Activation
from ..control import check_whole
from ..layer import SMoE
from .convert import place
from .find import FoundMLP, find_mlps
from .linear import set_weight
from .narrow import linears


@torch.no_grad()
def adopt_layers(dense: nn.Module, source: nn.Module) -> nn.Module:
    """Gives ``dense`` the weights of ``source``, and its SMoE layers in place of the MLPs; returns ``dense``.

    For a model whose code builds :class:`SMoE` layers, or dense ones like :class:`smoe.methods.DenseMLP`, where
    ``dense``, the same architecture, has linear layers. What comes out is a modulized model: ``smoe.save_pretrained``,
    ``smoe.from_pretrained`` and ``smoe.demodulize`` work on it. The SMoE layers themselves move: use ``source`` no
    longer.

    Args:
        dense: the model with MLPs that ``modulize`` finds, such as ``BertForMaskedLM(source.config)``; weights at will.
        source: the trained model. Outside its MLPs its tensors have the names that those of ``dense`` have.

    Raises:
        ValueError: the models don't match. ``dense`` is unchanged then.
    """
    check_whole(source, "adopt_layers")
    layers = {name: m for name, m in source.named_modules() if isinstance(m, SMoE) or _is_dense(m)}
    found = find_mlps(dense)
    if len(layers) != len(found):
        raise ValueError(f"{type(source).__name__} has {len(layers)} MLPs, but {type(dense).__name__} {len(found)}")
    for mlp, (name, layer) in zip(found, layers.items(), strict=True):
        _check_same(mlp, name, layer)
    inside = {id(p) for mlp in found for linear in linears(mlp) for p in linear.parameters()}
    rest = {name: t for name, t in dense.state_dict(keep_vars=True).items() if id(t) not in inside}
    given = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name in sorted(rest.keys() ^ given.keys()):
        raise ValueError(f"{name} is a tensor of {type(dense if name in rest else source).__name__} alone")
    for name, tensor in rest.items():
        if tensor.shape != given[name].shape:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}; it must be {tuple(tensor.shape)}")
    for name, tensor in rest.items():
        tensor.copy_(given[name])
    plan = []
    for mlp, layer in zip(found, layers.values(), strict=True):
        if isinstance(layer, SMoE):
            plan.append((mlp, partial(_itself, layer)))
        else:
            set_weight(mlp.match.up, layer.up.weight.clone(), layer.up.bias.clone())
            set_weight(mlp.match.down, layer.down.weight.clone(), layer.down.bias.clone())
    place(dense, plan)
    return dense


def _itself(layer: SMoE) -> SMoE:
    return layer


def _is_dense(module: nn.Module) -> bool:
    """Whether it is an MLP like ``smoe.methods.DenseMLP``, whatever its dropout."""
    parts = [getattr(module, name, None) for name in ("up", "down")]
    return all(isinstance(part, nn.Linear) for part in parts) and isinstance(
        getattr(module, "activation", None), Activation
    )


def _check_same(mlp: FoundMLP, name: str, layer: nn.Module) -> None:
    """A ValueError if ``layer`` can't stand in place of ``mlp``."""
    match = mlp.match
    wanted = (mlp.d_model, match.gate is not None or match.fused is not None, match.up.bias, match.down.bias)
    if isinstance(layer, SMoE):
        experts = layer.experts
        has, d_hidden = (layer.d_model, experts.gated, experts.up_bias, experts.down_bias), layer.d_hidden
        fits, activation = d_hidden <= mlp.d_hidden, experts.activation  # slimmed ones have fewer units
    else:
        has, d_hidden = (layer.up.in_features, False, layer.up.bias, layer.down.bias), layer.up.out_features
        fits, activation = d_hidden == mlp.d_hidden, layer.activation
    for field, value, right in zip(("d_model", "gate", "first bias", "last bias"), has, wanted, strict=True):
        if isinstance(right, (torch.Tensor, type(None))):
            value, right = value is not None, right is not None
        if value != right:
            raise ValueError(f"{name}: {field} is {value}; it must be {right}, as at {mlp.name}")
    if not fits:
        raise ValueError(f"{name} has d_hidden = {d_hidden}; it must be {mlp.d_hidden}, as at {mlp.name}")
    if activation.name != match.activation.name:
        raise ValueError(f"{name} has the activation {activation.name}; it must be {match.activation.name}")
