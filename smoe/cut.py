"""Cutting a dense MLP into experts, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import Experts, split_output_bias


@torch.no_grad()
def split(experts: Experts, dense: dict[str, Tensor]) -> None:
    """Cuts a dense MLP into ``experts``, in place: expert e gets the hidden units e * h to (e + 1) * h - 1.

    Args:
        dense: ``up_weight (H, d)``, ``down_weight (d, H)`` as ``nn.Linear`` holds them; optionally
            ``gate_weight (H, d)``, ``up_bias (H,)``, ``gate_bias (H,)``, ``down_bias (d,)``. A bias that is missing or
            None becomes zero.

    Raises:
        ValueError: a weight is missing, has the wrong shape, or has no counterpart in these experts. Nothing is changed
            then.
    """
    dense = {name: value for name, value in dense.items() if value is not None}
    _check_dense(experts, dense)
    for name, parameter in experts.named_parameters():
        value = dense.get(_dense_name(name))
        if value is None:
            parameter.zero_()
            continue
        if name == "down":
            value = value.t()
        elif name == "down_bias":
            # In the experts' own dtype: shares rounded one by one would no longer add up to the bias.
            value = split_output_bias(value.to(parameter.dtype), experts.num_experts)
        parameter.copy_(value.reshape(parameter.shape))


def _dense_name(name: str) -> str:
    return name if name.endswith("bias") else f"{name}_weight"


def _check_dense(experts: Experts, dense: dict[str, Tensor]) -> None:
    d_model, d_hidden = experts.d_model, experts.num_experts * experts.d_expert
    shapes = {"up": (d_hidden, d_model), "down": (d_model, d_hidden), "gate": (d_hidden, d_model)}
    shapes |= {"up_bias": (d_hidden,), "gate_bias": (d_hidden,), "down_bias": (d_model,)}
    shapes = {_dense_name(name): shapes[name] for name, _ in experts.named_parameters()}
    required = [name for name in shapes if name.endswith("weight")]
    for name in required:
        if name not in dense:
            raise ValueError(f"dense has no {name}; these experts need {', '.join(required)}")
    for name, value in dense.items():
        if name not in shapes:
            raise ValueError(f"dense has {name}; these experts have no place for it, they take {', '.join(shapes)}")
        if tuple(value.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shapes[name]}")


@torch.no_grad()
def merge(experts: Experts) -> dict[str, Tensor]:
    """The dense MLP that sums all experts: the exact inverse of :func:`split`, with the same keys and new tensors."""
    dense = {}
    for name, parameter in experts.named_parameters():
        if name == "down_bias":
            value = parameter.double().sum(0).to(parameter.dtype)
        else:
            value = parameter.reshape(-1, *parameter.shape[2:])
            value = (value.t() if name == "down" else value).clone(memory_format=torch.contiguous_format)
        dense[_dense_name(name)] = value
    return dense
