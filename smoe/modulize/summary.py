"""What was cut into experts, what was left, and why."""

from __future__ import annotations

from typing import TextIO

from torch import nn

from ..control import smoe_layers
from .find import FoundMLP, survey_mlps
from .record import options_of


def summary(model: nn.Module, file: TextIO | None = None) -> None:
    """Prints the SMoE layers of ``model``, the MLPs that are dense and why, and the number of parameters.

    Active parameters are those that one token uses at the current k: k of N experts per layer, and everything else.

    Args:
        file: where to print; None is the standard output.
    """
    layers = smoe_layers(model)
    total, active = count_parameters(model)
    print(f"{type(model).__name__}: {total:,} parameters, of which a token uses {active:,}", file=file)
    print(f"SMoE layers: {len(layers)}", file=file)
    for name, layer in layers:
        options = options_of(layer)
        print(
            f"  {name or '(the model itself)'}: {layer.top_k} of {layer.num_experts} experts, "
            f"{layer.d_model} -> {layer.d_hidden} -> {layer.d_model}, router {options['router']}, "
            f"score {options['score']}, output_scale {layer.output_scale}",
            file=file,
        )
    survey = survey_mlps(model, narrow=True)
    left = [(mlp.name, f"{_shape(mlp)}, not chosen" if layers else _shape(mlp)) for mlp in survey.found]
    left += [(mlp.name, f"{_shape(mlp)}, narrower than the model") for mlp in survey.narrow]
    left += [(label, "skipped by register_mlp") for label in survey.skipped]
    left += survey.refused
    print(f"dense MLPs and the like: {len(left)}", file=file)
    for name, why in left:
        print(f"  {name}: {why}", file=file)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those that one token uses at the current k). Each shared one counts once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle, seen = 0, set()
    for _, layer in smoe_layers(model):
        if id(layer.experts) not in seen:
            seen.add(id(layer.experts))
            experts = sum(parameter.numel() for parameter in layer.experts.parameters())
            idle += experts * (layer.num_experts - layer.top_k) // layer.num_experts
    return total, total - idle


def _shape(mlp: FoundMLP) -> str:
    return f"{mlp.d_model} -> {mlp.d_hidden} -> {mlp.d_model}"
