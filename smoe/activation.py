"""Activations by name, with the derivative that the fast expert paths need."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation:
    """An elementwise function and its backward.

    ``saves_output`` says what ``backward(grad, saved)`` wants as ``saved``: the output (ReLU: nothing else need be
    kept) or the input.
    """

    saves_output = False

    def __init__(self, name: str, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]):
        self.name = name
        self._forward = forward
        self._backward = backward

    def __call__(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def backward(self, grad: Tensor, saved: Tensor) -> Tensor:
        """d loss / d input, from d loss / d output and what was saved."""
        return self._backward(grad, saved)

    def __repr__(self) -> str:
        return self.name


class _ReLU(Activation):
    saves_output = True

    def __init__(self) -> None:
        super().__init__("relu", F.relu, lambda grad, out: torch.ops.aten.threshold_backward(grad, out, 0))


def _by_autograd(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x), x, grad)[0]

    return backward


_aten = torch.ops.aten
ACTIVATIONS = {
    "relu": _ReLU(),
    "gelu": Activation("gelu", F.gelu, lambda grad, x: _aten.gelu_backward(grad, x)),
    "gelu_tanh": Activation(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "silu": Activation("silu", F.silu, lambda grad, x: _aten.silu_backward(grad, x)),
}


def get_activation(activation: str | Callable[[Tensor], Tensor]) -> Activation:
    """A name of ``ACTIVATIONS``, or any elementwise function (its derivative then comes from autograd)."""
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)} or a function")
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)} or a function")
    name = getattr(activation, "__name__", type(activation).__name__)
    return Activation(name, activation, _by_autograd(activation))
