"""N small MLPs as stacked weights; cutting a dense MLP into experts, and back.

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
