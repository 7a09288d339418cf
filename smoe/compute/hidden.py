"""The hidden units of experts: what is kept of them for backward, how they come out of it, and their gradient."""

from __future__ import annotations

from torch import Tensor, mul

from ..activation import ACTIVATIONS, Activation
from .products import linear


def kept_units(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, activation: Activation
) -> list[Tensor]:
    """What backward wants kept of the m hidden units of rows x (n, d): one (n, m) tensor; gated, those of up and gate.

    Of an activation's input and output the one that it ``saves``; of up's product with the gate the linear output.
    """
    if gate is None:
        return [_saved(x, up, up_bias, activation)]
    return [linear(x, up, up_bias), _saved(x, gate, gate_bias, activation)]


def _saved(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    if activation is ACTIVATIONS["relu"]:
        return linear(x, weight, bias, relu=True)
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
