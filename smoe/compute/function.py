"""A fast path as one autograd function, or as one operator in a model that torch.compile compiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activation import ACTIVATIONS
from ..dropout import kept_scale
from ..experts import Experts
from ..uncompiled import uncompiled
from .compiled import experts_op
from .fast_path import Inputs, Parameters, cast, run_backward, run_forward
from .products import product_dtype


def run(path: str, x: Tensor, weights: Tensor, indices: Tensor | None, experts: Experts) -> Tensor:
    """x (T, d) -> y (T, d) through ``experts`` by a key of ``FAST_PATHS``. Not differentiable twice.

    A backward pass that does not retain the graph overwrites the hidden units that were saved for it: a hook on saved
    tensors that uses them afterwards must take a copy.
    """
    activation, dropout = experts.activation, experts.dropout if experts.drops else 0.0
    compiling, grad_enabled = torch.compiler.is_compiling(), torch.is_grad_enabled()
    # The operator cannot take a user's function, and does not draw random numbers.
    if compiling and (dropout or activation is not ACTIVATIONS.get(activation.name)):
        return _run_uncompiled(path, x, weights, indices, experts)
    x, down_bias = x.to(product_dtype(x)), experts.down_bias
    if dropout:
        # Scales up the few routing weights instead of the many hidden units that are kept. They multiply the second
        # bias too, so that is scaled down.
        weights = weights * kept_scale(dropout)
        down_bias = None if down_bias is None else down_bias / kept_scale(dropout)
    parameters = (experts.up, experts.up_bias, experts.gate, experts.gate_bias, experts.down, down_bias)
    with torch.autocast(x.device.type, enabled=False):
        if compiling:
            return experts_op(path, x, weights, indices, activation.name, grad_enabled, *parameters)[0]
        if not grad_enabled:
            inputs = Inputs(x, weights, indices, activation, Parameters(*parameters), dropout)
            return run_forward(path, inputs, False)[0]
        return _Function.apply(path, x, weights, indices, activation, dropout, *parameters)


_run_uncompiled = uncompiled(run)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, path, x, weights, indices, activation, dropout, *parameters):
        casts, keep = cast(Parameters(*parameters), x.dtype), any(ctx.needs_input_grad)
        y, saved = run_forward(path, Inputs(x, weights, indices, activation, casts, dropout), keep)
        if keep:
            ctx.save_for_backward(x, weights, indices, *casts, *saved)
            ctx.path, ctx.activation, ctx.dropout = path, activation, dropout
            wanted = ctx.needs_input_grad[-len(parameters) :]
            ctx.dtypes = Parameters(*(p.dtype if want else None for p, want in zip(parameters, wanted, strict=True)))
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # The gradients depend on x and the parameters too, which `once_differentiable` does not see: if grad_y is
        # constant (the loss is a sum), a second derivative would silently leave these out.
        return _backward(ctx, grad_y.detach().requires_grad_() if torch.is_grad_enabled() else grad_y)


@once_differentiable
def _backward(ctx, grad_y):
    x, weights, indices, *rest = ctx.saved_tensors
    inputs = Inputs(x, weights, indices, ctx.activation, Parameters(*rest[:6]), ctx.dropout)
    saved = [s.contiguous() for s in rest[6:]]  # hooks on saved tensors may have changed the layout
    reuse = not torch._C._autograd._get_current_graph_task_keep_graph()
    need_weights = ctx.needs_input_grad[2]
    grad_x, grad_weights, grads = run_backward(ctx.path, inputs, grad_y, saved, ctx.dtypes, need_weights, reuse)
    return None, grad_x, grad_weights, None, None, None, *grads
