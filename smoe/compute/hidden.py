"""The hidden units of experts: what is kept of them for backward, how they follow from it, and their gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation import ACTIVATIONS, Activation
from .fast_path import Parameters, each
from .products import linear, uses_onednn


class Kept(NamedTuple):
    """What backward wants kept of the m hidden units of some rows (n, m); also the gradients that take its place.

    up: the output or the input of the activation, whichever its backward wants; with a gate the linear output of up.
        As a gradient: that of the linear output of up.
    gate: the same of gate, whose activation it then is; None without.
    """

    up: Tensor
    gate: Tensor | None = None

    def rows(self, part: slice) -> Kept:
        return each(lambda t: t[part], self)


def flatten(kept: list[Kept]) -> list[Tensor]:
    return [t for units in kept for t in units if t is not None]


def unflatten(saved: list[Tensor], gated: bool) -> list[Kept]:
    return [Kept(*pair) for pair in zip(saved[::2], saved[1::2], strict=True)] if gated else [Kept(s) for s in saved]


def may_fuse_relu(x: Tensor, num_hidden: int, parameters: Parameters, activation: Activation) -> bool:
    """Whether ReLU may be a part of oneDNN's product for x (T, d), T > 0: only where nothing can be NaN.

    oneDNN's ReLU turns NaN into 0, so a NaN in x or in a weight would never show. To look for one, x and the weights of
    all experts are read once; that costs less than a separate ReLU unless there are few hidden units (num_hidden in
    total).
    """
    if activation is not ACTIVATIONS["relu"] or not uses_onednn(x, num_hidden // x.shape[0]):
        return False
    first = parameters[:2] if parameters.gate is None else parameters[2:4]
    inputs = [x, *(p for p in first if p is not None)]
    if num_hidden < sum(t.numel() for t in inputs):
        return False
    return all(math.isfinite(t.sum().item()) for t in inputs)  # infinity can become NaN in the product


def kept_units(x: Tensor, parameters: Parameters, activation: Activation, fuse: bool) -> Kept:
    """Of rows x (n, d), through first layers with up (m, d) and so on. fuse: see ``may_fuse_relu``."""
    if parameters.gate is None:
        return Kept(_kept(x, parameters.up, parameters.up_bias, activation, fuse))
    up = linear(x, parameters.up, parameters.up_bias)
    return Kept(up, _kept(x, parameters.gate, parameters.gate_bias, activation, fuse))


def _kept(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, fuse: bool) -> Tensor:
    if activation is ACTIVATIONS["relu"]:
        return linear(x, weight, bias, relu=True, fuse=fuse)
    output = linear(x, weight, bias)
    return activation(output) if activation.saves_output else output


def activated(kept: Kept, activation: Activation, out: Tensor) -> Tensor:
    """The hidden units: in ``out``, unless they are themselves what was kept."""
    if kept.gate is None:
        return kept.up if activation.saves_output else activation(kept.up, out=out)
    act = kept.gate if activation.saves_output else activation(kept.gate, out=out)
    return torch.mul(kept.up, act, out=out)


def linear_gradients(grad_hidden: Tensor, kept: Kept, activation: Activation, out: Kept, spare: list[Tensor]) -> None:
    """Gradients of the linear outputs, from that of the hidden units, into ``out``, which may be ``kept`` itself.

    spare: two more tensors of that size if there is a gate.
    """
    if kept.gate is None:
        activation.backward(grad_hidden, kept.up, out=out.up)
        return
    act = kept.gate if activation.saves_output else activation(kept.gate, out=spare[0])
    # Each kept tensor is read for the last time where the gradient that takes its place is written.
    grad_act = torch.mul(grad_hidden, kept.up, out=spare[1])
    torch.mul(grad_hidden, act, out=out.up)
    activation.backward(grad_act, kept.gate, out=out.gate)
