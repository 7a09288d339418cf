"""Activations by name, with the derivative that the fast expert paths need."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (gradient of the output, saved, tensor that takes the result or None) -> gradient of the input
Backward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Activation:
    """An elementwise function and its backward.

    ``saves_output`` says what ``backward(grad, saved)`` wants as ``saved``: the output (ReLU: nothing else need be
    kept) or the input.
    """

    saves_output = False

    def __init__(
        self,
        name: str,
        forward: Callable[[Tensor], Tensor],
        backward: Backward,
        forward_out: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.name = name
        self._forward = forward
        self._backward = backward
        self._forward_out = forward_out

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The function of x; without gradients it may be written to ``out``, which then is what is returned."""
        if out is None:
            return self._forward(x)
        if self._forward_out is not None:
            return self._forward_out(x, out)
        # A copy, since a function of the user's may work in place.
        return out.copy_(self._forward(out.copy_(x)))

    def backward(self, grad: Tensor, saved: Tensor, out: Tensor | None = None) -> Tensor:
        """d loss / d input, from d loss / d output and what was saved; written to ``out``, which may be one of them."""
        return self._backward(grad, saved, out)

    def __reduce__(self):
        # By name, since the functions of ACTIVATIONS are closures; a function of the user's must itself be picklable.
        return get_activation, (self.name if ACTIVATIONS.get(self.name) is self else self._forward,)

    def __repr__(self) -> str:
        return self.name


def _out_variant(operator, *args, **kwargs) -> Backward:
    def backward(grad: Tensor, saved: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return operator(grad, saved, *args, **kwargs)
        return operator.grad_input(grad, saved, *args, **kwargs, grad_input=out)

    return backward


class _ReLU(Activation):
    saves_output = True

    def __init__(self) -> None:
        super().__init__("relu", F.relu, _out_variant(torch.ops.aten.threshold_backward, 0))


def _by_autograd(function: Callable[[Tensor], Tensor]) -> Backward:
    def backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (grad_x,) = torch.autograd.grad(function(x.clone()), x, grad)  # a clone: it may work in place
        return grad_x if out is None else out.copy_(grad_x)

    return backward


_aten = torch.ops.aten
ACTIVATIONS = {
    "relu": _ReLU(),
    "gelu": Activation("gelu", F.gelu, _out_variant(_aten.gelu_backward), lambda x, out: _aten.gelu.out(x, out=out)),
    "gelu_tanh": Activation(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        _out_variant(_aten.gelu_backward, approximate="tanh"),
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
    ),
    "silu": Activation("silu", F.silu, _out_variant(_aten.silu_backward), lambda x, out: _aten.silu.out(x, out=out)),
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
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError(f"activation is {activation!r}, which has parameters; it must be a function without any")
    name = getattr(activation, "__name__", type(activation).__name__)
    return Activation(name, activation, _by_autograd(activation))
