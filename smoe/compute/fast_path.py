"""What a path with a backward of its own, which keeps only what that backward needs, is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import Activation


class Parameters(NamedTuple):
    """One entry per parameter of :class:`~smoe.experts.Experts`: itself, its gradient or its dtype; or None."""

    up: Any
    up_bias: Any
    gate: Any
    gate_bias: Any
    down: Any
    down_bias: Any


def each(function: Callable[[Any], Any], entries: Any) -> Any:
    """A named tuple like ``entries``: ``function`` of each, None where that is None."""
    return type(entries)(*(None if entry is None else function(entry) for entry in entries))


def cast(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    return each(lambda p: p.to(dtype), parameters)


class Inputs(NamedTuple):
    """x (T, d); weights (T, k) and indices (T, k), or weights (T, N) and no indices: every token visits all experts.

    dropout: the rate at which hidden units are set to 0. Unlike in nn.Dropout the others stay as they are.
    """

    x: Tensor
    weights: Tensor
    indices: Tensor | None
    activation: Activation
    parameters: Parameters
    dropout: float = 0.0

    def cast(self) -> Inputs:
        """With everything in the dtype of x."""
        return self._replace(weights=self.weights.to(self.x.dtype), parameters=cast(self.parameters, self.x.dtype))


class FastPath(NamedTuple):
    """The functions of a fast path, for T > 0 and inputs of one dtype.

    forward(inputs, keep) -> y, and (if ``keep``) what backward wants saved.
    backward(inputs, grad_y, saved, grads, need_weights, reuse) -> gradients of x and of weights (None unless
        ``need_weights``). Writes the gradients of the parameters into ``grads``, where None means not wanted. With
        ``reuse`` it may overwrite what was saved.
    saved_shapes(x, indices, num_experts, h) -> the shapes of what forward saves without dropout; gated: each twice.
    """

    forward: Callable[[Inputs, bool], tuple[Tensor, list[Tensor]]]
    backward: Callable[[Inputs, Tensor, list[Tensor], Parameters, bool, bool], tuple[Tensor, Tensor | None]]
    saved_shapes: Callable[[Tensor, Tensor | None, int, int], list[tuple[int, int]]]


FAST_PATHS: dict[str, FastPath] = {}  # by their names in PATHS; each module adds its own


def run_forward(path: str, inputs: Inputs, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """y (T, d) in the dtype of x, and (if ``keep``) what backward wants saved; for any T and dtypes."""
    if inputs.x.shape[0] == 0:
        return inputs.x.new_empty(inputs.x.shape), []
    return FAST_PATHS[path].forward(inputs.cast(), keep)


def run_backward(
    path: str, inputs: Inputs, grad_y: Tensor, saved: list[Tensor], dtypes: Parameters, need_weights: bool, reuse: bool
) -> tuple[Tensor, Tensor | None, Parameters]:
    """Gradients of x, of weights (None unless wanted) and of the parameters, these in ``dtypes`` (None: not wanted)."""
    x, weights = inputs.x, inputs.weights
    make = torch.empty if x.shape[0] else torch.zeros  # contiguous, also where the parameter is not
    pairs = zip(inputs.parameters, dtypes, strict=True)
    grads = Parameters(*(None if t is None else make(p.shape, dtype=t, device=p.device) for p, t in pairs))
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.zeros_like(weights) if need_weights else None, grads
    backward = FAST_PATHS[path].backward
    grad_x, grad_weights = backward(inputs.cast(), grad_y.contiguous(), saved, grads, need_weights, reuse)
    return grad_x, None if grad_weights is None else grad_weights.to(weights.dtype), grads
