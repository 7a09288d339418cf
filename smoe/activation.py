"""Activations by name, with the derivative that the fast paths of ``smoe.compute`` need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation:
    """An elementwise function and its derivative, which here comes from autograd."""

    # What `backward` wants as `saved`: the output (ReLU alone) or the input.
    saves_output = False

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self._function = function

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The function of x. Without gradients, ``out`` may be given; the result is written to it and returned."""
        if out is None:
            return self._function(x)
        return out.copy_(self._function(out.copy_(x)))  # of a copy, because a user's function may work in place

    def backward(self, grad: Tensor, saved: Tensor, out: Tensor) -> Tensor:
        """d loss / d input, from d loss / d output and what was saved; written to ``out``, which may be one of them."""
        with torch.enable_grad():
            x = saved.detach().requires_grad_()
            (grad_x,) = torch.autograd.grad(self._function(x.clone()), x, grad)  # of a clone: it may work in place
        return out.copy_(grad_x)

    def __reduce__(self):
        # By name where it has one in ACTIVATIONS; a user's function must itself be picklable.
        return get_activation, (self.name if ACTIVATIONS.get(self.name) is self else self._function,)

    def __repr__(self) -> str:
        return self.name


class _BuiltIn(Activation):
    """An activation of PyTorch, with the operators that write its result and its gradient to a given tensor."""

    def __init__(self, name: str, function: Any, forward: Any, backward: Any, saves_output: bool = False) -> None:
        super().__init__(name, function)
        self._forward, self._backward, self.saves_output = forward, backward, saves_output

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._function(x) if out is None else self._forward(x, out=out)

    def backward(self, grad: Tensor, saved: Tensor, out: Tensor) -> Tensor:
        return self._backward(grad, saved, grad_input=out)


_aten, _tanh = torch.ops.aten, {"approximate": "tanh"}
_relu_backward = partial(_aten.threshold_backward.grad_input, threshold=0)
_gelu, _gelu_backward = _aten.gelu.out, _aten.gelu_backward.grad_input
ACTIVATIONS: dict[str, Activation] = {
    "relu": _BuiltIn("relu", F.relu, _aten.relu.out, _relu_backward, saves_output=True),
    "gelu": _BuiltIn("gelu", F.gelu, _gelu, _gelu_backward),
    "gelu_tanh": _BuiltIn(
        "gelu_tanh", partial(F.gelu, **_tanh), partial(_gelu, **_tanh), partial(_gelu_backward, **_tanh)
    ),
    "silu": _BuiltIn("silu", F.silu, _aten.silu.out, _aten.silu_backward.grad_input),
}


def get_activation(activation: str | Callable[[Tensor], Tensor]) -> Activation:
    """A name of ``ACTIVATIONS``, or any elementwise function without parameters."""
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if isinstance(activation, str) or not callable(activation):
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)} or a function")
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError(f"activation is {activation!r}, which has parameters; it must be a function without any")
    return Activation(getattr(activation, "__name__", type(activation).__name__), activation)
