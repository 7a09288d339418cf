"""N small MLPs as stacked weights.

Shapes: N experts, d model width, h hidden width of one expert, H = N * h hidden width of the whole MLP.

The weights of both linear layers are stored as ``(N, h, d)``, hidden units first. So all experts together are a dense
MLP without moving a byte: ``up.view(H, d)`` is its first matrix and ``down.view(H, d)`` the transpose of its second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .activation import get_activation
from .dropout import dropout


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def check_divisible(d_hidden: int, num_experts: int) -> int:
    """h = d_hidden / num_experts, or a ValueError that names the nearest d_hidden that would fit."""
    _check_size("num_experts", num_experts)
    _check_size("d_hidden", d_hidden)
    if d_hidden % num_experts:
        below = d_hidden // num_experts * num_experts
        fitting = f"{below} and {below + num_experts} fit" if below else f"the smallest that fits is {num_experts}"
        raise ValueError(f"d_hidden is {d_hidden}, which num_experts = {num_experts} does not divide; {fitting}")
    return d_hidden // num_experts


def is_int8(parameter: Tensor) -> bool:
    """Whether ``smoe.export.to_int8`` has quantised a weight: it is torchao's ``Int8Tensor`` then."""
    return hasattr(parameter, "qdata")


class Experts(nn.Module):
    """N MLPs of hidden width h: ``E_e(x) = act(x @ up[e].T + up_bias[e]) @ down[e] + down_bias[e]``.

    The hidden units of gated experts (as in Llama) are ``act(x @ gate[e].T + gate_bias[e]) * (x @ up[e].T +
    up_bias[e])``.

    Parameters: up, down and (gated) gate ``(N, h, d)``; up_bias and gate_bias ``(N, h)``; down_bias ``(N, d)``.
    Initialised like the dense MLP they are cut from (``nn.Linear``'s default).

    Args:
        num_experts: N.
        d_model: d.
        d_expert: h.
        activation: ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, or any elementwise function.
        bias: whether the linear layers have a bias.
        gated: whether there is a gate.
        dropout: rate of the dropout on the hidden units, 0 to 1 (0 in the paper, which leaves out experts instead).
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_expert: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        bias: bool = True,
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout!r}; it must be a rate from 0 to 1")
        for name, value in (("num_experts", num_experts), ("d_model", d_model), ("d_expert", d_expert)):
            _check_size(name, value)
        self.num_experts, self.d_model, self.d_expert = num_experts, d_model, d_expert
        self.activation = get_activation(activation)
        self.dropout = dropout
        shape = (num_experts, d_expert, d_model)
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape))
        self.gate = nn.Parameter(torch.empty(shape)) if gated else None
        self.up_bias = nn.Parameter(torch.empty(num_experts, d_expert)) if bias else None
        self.gate_bias = nn.Parameter(torch.empty(num_experts, d_expert)) if bias and gated else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, d_model)) if bias else None
        self.reset_parameters()

    @property
    def drops(self) -> bool:
        """Whether hidden units are dropped now."""
        return self.training and self.dropout > 0

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def int8(self) -> bool:
        """Whether the weights are quantised (see :func:`is_int8`)."""
        return is_int8(self.up)

    def hidden(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """Hidden units from the outputs of the first linear layers, all (..., h): ``act(up)`` or ``act(gate) * up``.

        In training with dropout; a second call drops other units.
        """
        act = self.activation(up if gate is None else gate)
        if self.drops:
            act = dropout(act, self.dropout)
        return act if gate is None else act * up

    def forward(self, x: Tensor, routing: Any, compute: Callable[[Tensor, Experts, Any], Tensor]) -> Tensor:
        """``compute(x, self, routing)``. A call of the module, so that FSDP gathers its weights first."""
        return compute(x, self, routing)

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        """Draws new weights.

        ``std=None``: as ``nn.Linear`` does for the dense MLP, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with fan-in d for the
        first layer and H for the second, whose bias is shared out evenly. A number: weights N(0, std), biases 0.
        """
        for name in ("up", "gate", "up_bias", "gate_bias", "down", "down_bias"):
            parameter = getattr(self, name)
            if parameter is None:
                continue
            fan_in = self.num_experts * self.d_expert if name.startswith("down") else self.d_model
            bound = 1 / math.sqrt(fan_in)
            if std is not None:
                parameter.zero_() if name.endswith("bias") else parameter.normal_(0.0, std)
            elif name == "down_bias":
                whole = torch.empty(self.d_model, device=parameter.device).uniform_(-bound, bound)
                parameter.copy_(split_output_bias(whole, self.num_experts))
            else:
                parameter.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, d_model={self.d_model}, d_expert={self.d_expert}, "
            f"activation={self.activation}, bias={self.up_bias is not None}, gated={self.gated}"
        ) + (f", dropout={self.dropout}" if self.dropout else "")


def split_output_bias(bias: Tensor, num_experts: int) -> Tensor:
    """(d,) -> (N, d), rows that add up to ``bias``: exactly in float64, rounded once; for float32 and narrower.

    Every expert carries its share, so that k of N experts contribute about k/N of the bias. N - 1 shares are bias / N,
    rounded; the last takes what is left, which keeps the sum exact where N is no power of two.
    """
    share = (bias.double() / num_experts).to(bias.dtype)
    rows = share.repeat(num_experts, 1)
    rows[-1] = (bias.double() - (num_experts - 1) * share.double()).to(bias.dtype)
    return rows
