"""The hidden units of experts: what is kept of them for backward, how they come out of it, and their gradient."""

from __future__ import annotations

import math

from torch import Tensor, mul

from ..activation import ACTIVATIONS, Activation
from .products import linear, uses_onednn


def may_fuse_relu(x: Tensor, num_hidden: int, parameters: list[Tensor | None], activation: Activation) -> bool:
    """Whether ReLU may be a part of oneDNN's product for x (T, d), T > 0: only where nothing can be NaN.

    oneDNN's ReLU makes 0 of NaN, and one in x or in a weight would never show. To look for it reads x and the weights
    of all experts once; that is less than a ReLU of its own unless there are few hidden units (num_hidden, in all).
    """
    first = [x, *(p for p in parameters[2 if parameters[2] is not None else 0 :][:2] if p is not None)]
    few = num_hidden < sum(t.numel() for t in first)
    if few or activation is not ACTIVATIONS["relu"] or not uses_onednn(x, num_hidden // x.shape[0]):
        return False
    return all(math.isfinite(t.sum().item()) for t in first)  # infinity can become NaN in the product


def kept_units(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: Activation,
    fuse: bool,
) -> list[Tensor]:
    """What backward wants kept of the m hidden units of rows x (n, d): one (n, m) tensor; gated, those of up and gate.

    Of an activation's input and output the one that it ``saves``; of up's product with the gate the linear output.
    fuse: see ``may_fuse_relu``.
    """
    if gate is None:
        return [_saved(x, up, up_bias, activation, fuse)]
    return [linear(x, up, up_bias), _saved(x, gate, gate_bias, activation, fuse)]


def _saved(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, fuse: bool) -> Tensor:
    if activation is ACTIVATIONS["relu"]:
        return linear(x, weight, bias, relu=True, fuse=fuse)
    pre = linear(x, weight, bias)
    return activation(pre) if activation.saves_output else pre


def activated(kept: list[Tensor], activation: Activation, out: Tensor) -> Tensor:
    """Hidden units from what was kept of them: in ``out``, unless they are themselves what was kept."""
    if len(kept) == 1:
        return kept[0] if activation.saves_output else activation(kept[0], out=out)
    up, gate = kept
    act = gate if activation.saves_output else activation(gate, out=out)
    return mul(up, act, out=out)


def pre_gradients(
    grad_hidden: Tensor, kept: list[Tensor], activation: Activation, out: list[Tensor], spare: list[Tensor]
) -> None:
    """The gradients of the linear outputs from that of the hidden units, into ``out``, which may be ``kept`` itself.

    spare: two more tensors of that size if there is a gate.
    """
    if len(kept) == 1:
        activation.backward(grad_hidden, kept[0], out=out[0])
        return
    up, gate = kept  # hidden = act(gate) * up
    act = gate if activation.saves_output else activation(gate, out=spare[0])
    # What was kept is read for the last time where the gradient that takes its place is written.
    grad_act = mul(grad_hidden, up, out=spare[1])
    mul(grad_hidden, act, out=out[0])
    activation.backward(grad_act, gate, out=out[1])
