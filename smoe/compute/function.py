"""The fast paths as one autograd function: a kernel's own forward and backward, keeping only what backward needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activation import ACTIVATIONS
from ..experts import Experts


class Kernel(NamedTuple):
    """How experts are computed and differentiated.

    forward(x, weights, indices, activation, parameters, keep) -> y, and (if ``keep``) what backward wants saved.
    backward(grad_y, x, weights, indices, activation, parameters, saved, need_weights, dtypes, reuse) -> gradients of x,
        of weights (None unless ``need_weights``) and of the parameters, these in ``dtypes`` (None: not wanted, the
        parameter is frozen); with ``reuse`` what was saved may be overwritten.
    shapes(x, indices, num_experts, h) -> the shapes of what forward saves for T > 0 tokens; gated experts: twice those.

    x (T, d) and everything else are of one dtype; weights (T, k) or (T, N); indices (T, k) or None (all N experts).
    parameters: up, up_bias, gate, gate_bias, down, down_bias of :class:`~smoe.experts.Experts`, None where it has none.
    """

    forward: Callable
    backward: Callable
    shapes: Callable


def run(kernel: Kernel, x: Tensor, weights: Tensor, indices: Tensor | None, experts: Experts) -> Tensor:
    """x (T, d) -> y (T, d) through ``experts``. Not differentiable twice.

    A backward pass that doesn't retain the graph overwrites the hidden units that were saved for it: a hook on saved
    tensors that goes on using them afterwards must take a copy.
    """
    named = experts.activation is ACTIVATIONS.get(experts.activation.name)
    if torch.compiler.is_compiling() and not named:  # an operator can't be given a function of the user's
        return _run_uncompiled(kernel, x, weights, indices, experts)
    # Under autocast the matrix products run in its dtype, as those of nn.Linear do.
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    parameters = (experts.up, experts.up_bias, experts.gate, experts.gate_bias, experts.down, experts.down_bias)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            keep = torch.is_grad_enabled()
            return experts_op(x.to(dtype), weights, indices, experts.activation.name, keep, *parameters)[0]
        if not torch.is_grad_enabled():
            return kernel.forward(
                x.to(dtype), weights.to(dtype), indices, experts.activation, cast(parameters, dtype), False
            )[0]
        return _Function.apply(kernel, x.to(dtype), weights, indices, experts.activation, *parameters)


@torch._disable_dynamo  # torch.compiler.disable would import the compiler together with smoe
def _run_uncompiled(kernel: Kernel, x: Tensor, weights: Tensor, indices: Tensor | None, experts: Experts) -> Tensor:
    return run(kernel, x, weights, indices, experts)


def cast(parameters: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    """Parameters in the dtype of the products."""
    return [None if p is None else p.to(dtype) for p in parameters]


def empty_gradients(
    parameters: list[Tensor | None], dtypes: list[torch.dtype | None], zero: bool
) -> list[Tensor | None]:
    """Where a kernel writes the gradients of its parameters, contiguous even if these are not; with ``zero`` all 0.

    None where the dtype is None.
    """
    make = torch.zeros if zero else torch.empty
    return [
        None if p is None or dtype is None else make(p.shape, dtype=dtype, device=p.device)
        for p, dtype in zip(parameters, dtypes, strict=True)
    ]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, x, weights, indices, activation, *parameters):
        in_dtype = cast(parameters, x.dtype)
        keep = any(ctx.needs_input_grad)
        y, saved = kernel.forward(x, weights.to(x.dtype), indices, activation, in_dtype, keep)
        if keep:
            ctx.save_for_backward(x, weights, indices, *in_dtype, *saved)
            ctx.kernel, ctx.activation = kernel, activation
            wanted = ctx.needs_input_grad[-len(parameters) :]
            ctx.dtypes = [p.dtype if want else None for p, want in zip(parameters, wanted, strict=True)]
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # A gradient depends on x and the parameters too, which `once_differentiable` forgets: where grad_y is constant
        # (the loss is a sum), a second derivative would leave these out without a word.
        return _backward(ctx, grad_y.detach().requires_grad_() if torch.is_grad_enabled() else grad_y)


@once_differentiable
def _backward(ctx, grad_y):
    x, weights, indices, *rest = ctx.saved_tensors
    grad_x, grad_weights, grads = ctx.kernel.backward(
        grad_y.contiguous(),
        x,
        weights.to(x.dtype),
        indices,
        ctx.activation,
        rest[:6],
        [s.contiguous() for s in rest[6:]],  # hooks on saved tensors may have laid them out anew
        ctx.needs_input_grad[2],
        ctx.dtypes,
        not torch._C._autograd._get_current_graph_task_keep_graph(),
    )
    grad_weights = None if grad_weights is None else grad_weights.to(weights.dtype)
    return None, grad_x, grad_weights, None, None, *grads


# At the end, since its operators call the kernels, which import this module.
from .compiled import experts_op  # noqa: E402
