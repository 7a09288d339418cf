"""Experts and linear layers in int8, quantised by torchao."""

from __future__ import annotations

import importlib.util

from torch import nn

from ..control import check_whole, smoe_layers


def to_int8(model: nn.Module, *, dynamic: bool = False) -> nn.Module:
    """Quantises the experts of ``model``, and its linear layers, to int8 with torchao, in place; for inference.

    ``torchao.quantization.quantize_`` alone passes experts by, which are no ``nn.Linear``. Here every expert's matrices
    are quantised as torchao quantises those of a linear layer: one scale per output. k can be set as before, and
    experts can be voted for and slimmed. Routers and biases stay as they are.

    Save with ``torch.save(model.state_dict(), file)``; load into the same model, quantised or not, with
    ``model.load_state_dict(torch.load(file, weights_only=True), assign=True)``, after ``import torchao``.

    Args:
        model: with or without SMoE layers.
        dynamic: whether inputs are rounded to int8 as well, at every pass, one scale per token (torchao's
            ``Int8DynamicActivationInt8WeightConfig``): less exact. Else weights alone (``Int8WeightOnlyConfig``). Both
            take a quarter of the memory of float32, and without a compiler more time (docs/ship.md).

    Raises:
        ValueError: torchao is not installed, or the experts can't be quantised: spread over ranks, wrapped by PEFT,
            offloaded, of engine ``fastmoe``, or in int8 already. Nothing is changed then.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("to_int8 needs torchao: pip install torchao")
    check_whole(model, "to_int8")
    experts = {}
    for name, layer in smoe_layers(model):
        if layer.engine == "fastmoe":
            raise ValueError(f"layer {name} has engine 'fastmoe', which computes no int8; build it with engine 'torch'")
        if layer.experts.int8:
            raise ValueError(f"the experts of layer {name} are int8 already")
        experts[f"{name}.experts".lstrip(".")] = layer.experts
    from torchao.quantization import (
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    def config(dim: int) -> Int8WeightOnlyConfig | Int8DynamicActivationInt8WeightConfig:
        """One scale for everything along ``dim`` of a weight, which is what is summed over."""
        if dynamic:
            return Int8DynamicActivationInt8WeightConfig(granularity=[PerRow(), PerRow(dim)])
        return Int8WeightOnlyConfig(granularity=PerRow(dim))

    configs = {}
    for name, module in experts.items():
        configs |= {f"{name}.{part}": config(-1) for part in (("up", "gate") if module.gated else ("up",))}
        configs[f"{name}.down"] = config(1)  # (N, h, d): over the hidden units
    quantize_(model, FqnToConfig(configs), filter_fn=None)
    quantize_(model, config(-1))  # the linear layers
    return model
