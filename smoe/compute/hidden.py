"""The hidden units of experts: what is kept of them for backward, how they follow from it, and their gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation import ACTIVATIONS, Activation
from ..dropout import keep_mask
from .fast_path import Inputs, Parameters, each
from .products import linear, uses_onednn


class Kept(NamedTuple):
    """What backward wants kept of the m hidden units of some rows (n, m); also the gradients that take its place.

    up: the output or the input of the activation, whichever its backward wants; with a gate the linear output of up.
        As a gradient: that of the linear output of up.
    gate: the same of gate, whose activation it then is; None without.
    mask: 0 for dropped hidden units, else 1; None without dropout. ReLU needs none either: what is kept is its output,
        which is 0 for dropped units, and so is its gradient then.
    """

    up: Tensor
    gate: Tensor | None = None
    mask: Tensor | None = None

    def rows(self, part: slice) -> Kept:
        return each(lambda t: t[part], self)


def flatten(kept: list[Kept]) -> list[Tensor]:
    return [t for units in kept for t in units if t is not None]


def unflatten(saved: list[Tensor], inputs: Inputs) -> list[Kept]:
    gated, masked = inputs.parameters.gate is not None, inputs.dropout > 0 and not inputs.activation.saves_output
    entries = iter(saved)
    return [Kept(up, next(entries) if gated else None, next(entries) if masked else None) for up in entries]


def room_for_gradients(kept: list[Kept], reuse: bool) -> list[Kept]:
    """Where ``linear_gradients`` writes: with ``reuse`` to what was kept."""
    return kept if reuse else [each(torch.empty_like, units._replace(mask=None)) for units in kept]


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


def kept_units(x: Tensor, parameters: Parameters, inputs: Inputs, fuse: bool) -> Kept:
    """Of rows x (n, d) through ``parameters`` with up (m, d) and so on, after dropout. fuse: see ``may_fuse_relu``."""
    up, up_bias, gate, gate_bias, *_ = parameters
    if gate is None:
        kept, mask = _first_layer(x, up, up_bias, inputs, fuse)
        return Kept(kept, mask=mask)
    return Kept(linear(x, up, up_bias), *_first_layer(x, gate, gate_bias, inputs, fuse))


def _first_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, fuse: bool
) -> tuple[Tensor, Tensor | None]:
    """What is kept of the activation, and the mask."""
    relu = inputs.activation.saves_output  # no other activation does
    kept = linear(x, weight, bias, relu, fuse)
    if not inputs.dropout:
        return kept, None
    mask = keep_mask(kept.shape, inputs.dropout, kept)
    return (torch.mul(kept, mask, out=mask), None) if relu else (kept, mask)


def activated(kept: Kept, activation: Activation, out: Tensor) -> Tensor:
    """The hidden units: in ``out``, unless they are themselves what was kept."""
    inner = kept.up if kept.gate is None else kept.gate
    hidden = inner if activation.saves_output else activation(inner, out=out)
    if kept.gate is not None:
        hidden = torch.mul(kept.up, hidden, out=out)
    return hidden if kept.mask is None else torch.mul(hidden, kept.mask, out=out)


def linear_gradients(grad_hidden: Tensor, kept: Kept, activation: Activation, out: Kept, spare: list[Tensor]) -> None:
    """Gradients of the linear outputs, from that of the hidden units, into ``out``, which may be ``kept`` itself.

    grad_hidden is overwritten. spare: two more tensors of that size if there is a gate.
    """
    if kept.mask is not None:
        grad_hidden.mul_(kept.mask)
    if kept.gate is None:
        activation.backward(grad_hidden, kept.up, out=out.up)
        return
    act = kept.gate if activation.saves_output else activation(kept.gate, out=spare[0])
    # Each kept tensor is read for the last time where the gradient that takes its place is written.
    grad_act = torch.mul(grad_hidden, kept.up, out=spare[1])
    torch.mul(grad_hidden, act, out=out.up)
    activation.backward(grad_act, kept.gate, out=out.gate)
