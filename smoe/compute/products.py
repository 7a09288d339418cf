"""The products that the fast paths are made of, each in the form that PyTorch runs fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of the products that `group_dots` sums at a time.
DOT_BYTES = 1 << 20


def _onednn_linear_exists() -> bool:
    try:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


_ONEDNN = _onednn_linear_exists()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, and relu of it on request; x (T, d), weight (h, d), bias (h,) -> (T, h), a new tensor.

    In bfloat16 on a CPU ``addmm`` first copies the bias into every row and adds in a second pass; oneDNN's own
    linear layer (what inductor calls) adds bias and ReLU while the result is still in registers: up to twice as fast.
    In float32 MKL's ``addmm`` is the faster one.
    """
    if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
    # With out=, since selective checkpointing, which keeps what mm and addmm return, forbids to change that (relu_).
    out = x.new_empty(x.shape[0], weight.shape[0])
    torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    return out.relu_() if relu else out


def combine(pairs: Tensor, position: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """``out[t] = sum_j weights[t, j] * pairs[position[t, j]]``; pairs (P, d), position and weights (T, K), out (T, d).

    This is what an embedding bag does: one read of every pair, sums in float32, one rounding. On a CPU it is several
    times faster than adding expert after expert with ``index_add_``, which also rounds or widens each time.
    """
    if pairs.shape[0] == 0:  # all slots of these tokens are absent
        out.zero_()
        return
    out.copy_(F.embedding_bag(position, pairs, mode="sum", per_sample_weights=weights))


def scale_(hidden: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """hidden (n, m * h) times weights (n, m), each for its h neighbours, into ``out``."""
    groups = weights.shape[1]
    if groups == 1:
        return torch.mul(hidden, weights, out=out)
    n = hidden.shape[0]
    torch.mul(hidden.view(n, groups, -1), weights.unsqueeze(2), out=out.view(n, groups, -1))
    return out


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out[:] = a @ b``, also where ``out`` has a wider dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def group_dots(a: Tensor, b: Tensor, groups: int, out: Tensor) -> None:
    """a and b (n, m * h) -> out (n, m): the sums of ``a * b`` over h neighbours, a block of rows at a time."""
    rows = max(DOT_BYTES // max(a.shape[1] * a.element_size(), 1), 1)
    buffer = a.new_empty(min(rows, a.shape[0]), a.shape[1])
    for first in range(0, a.shape[0], rows):
        part = slice(first, first + rows)
        product = torch.mul(a[part], b[part], out=buffer[: a[part].shape[0]])
        torch.sum(product.view(product.shape[0], groups, -1), 2, out=out[part])
