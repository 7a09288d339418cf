"""The products that the fast paths are made of, each in the form that PyTorch runs fastest."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# Bytes of the products that `group_dots` sums at a time.
DOT_BYTES = 1 << 20
# Multiply-adds from which a product of float32 is worth a kernel that oneDNN has to compile, where MKL could do it.
ONEDNN_FLOAT32 = 1 << 22


@functools.cache
def _onednn_bfloat16() -> bool:
    try:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def onednn_float32() -> bool:
    """Whether float32 products go to oneDNN: where PyTorch's own go to MKL and the processor is not Intel's.

    MKL runs at half speed there: 235 against 490 GF/s on two cores of an AMD EPYC 9005 (2048 x 768 x 192).
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def uses_onednn(x: Tensor, columns: int) -> bool:
    """Whether the product of x (n, d) with a matrix of so many columns goes to oneDNN."""
    if x.device.type != "cpu":
        return False
    if x.dtype == torch.float32:
        return x.numel() * columns >= ONEDNN_FLOAT32 and onednn_float32()
    return x.dtype == torch.bfloat16 and _onednn_bfloat16()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x, as in nn.Linear: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, fuse: bool = False) -> Tensor:
    """``x @ weight.T + bias``, with ReLU on request; x (T, d), weight (h, d), bias (h,) -> (T, h), a new tensor.

    In bfloat16 on a CPU ``addmm`` first copies the bias into every row and adds the product in a second pass. oneDNN's
    linear layer (which inductor calls too) adds bias and ReLU while the result is still in registers: up to twice as
    fast. In float32 MKL's ``addmm`` is the faster one, but on Intel's processors only.

    fuse: whether ReLU may be left to oneDNN, whose ReLU of NaN is 0 (see ``hidden.may_fuse_relu``).
    """
    if uses_onednn(x, weight.shape[0]):
        out = onednn_linear(x, weight, bias, relu and fuse)
        return out.relu() if relu and not fuse else out
    # With out=, because selective checkpointing, which keeps what mm and addmm return, forbids changing that (relu_).
    out = x.new_empty(x.shape[0], weight.shape[0])
    torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    return out.relu_() if relu else out


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """:func:`linear` by oneDNN, where there is one (see :func:`uses_onednn`)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out[:] = a @ b``, also where ``out`` has a wider dtype."""
    if a.dtype == torch.float32 and uses_onednn(a, b.shape[1]):
        out.copy_(onednn_linear(a, b.t(), None))
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def scale_(hidden: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """hidden (n, m * h) times weights (n, m), each weight for h neighbours, into ``out``."""
    n, m = weights.shape
    if m == 1:
        return torch.mul(hidden, weights, out=out)
    torch.mul(hidden.view(n, m, -1), weights.unsqueeze(2), out=out.view(n, m, -1))
    return out


def group_dots(a: Tensor, b: Tensor, groups: int, out: Tensor) -> None:
    """a and b (n, m * h) -> out (n, m): the sums of ``a * b`` over h neighbours, a block of rows at a time."""
    rows = max(DOT_BYTES // max(a.shape[1] * a.element_size(), 1), 1)
    buffer = a.new_empty(min(rows, a.shape[0]), a.shape[1])
    for first in range(0, a.shape[0], rows):
        part = slice(first, first + rows)
        product = torch.mul(a[part], b[part], out=buffer[: a[part].shape[0]])
        torch.sum(product.view(product.shape[0], groups, -1), 2, out=out[part])
