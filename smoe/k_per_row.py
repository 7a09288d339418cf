"""A k of its own for every row of a batch: checked once, and given to the row's tokens in every layer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_k_per_row(k: Tensor, num_experts: int) -> None:
    """A ValueError unless k, (batch,) or of more dimensions, holds whole numbers in 1..num_experts."""
    if k.dtype == torch.bool or k.is_floating_point() or k.is_complex():
        raise ValueError(f"k is a tensor of {k.dtype}; it must be one of whole numbers")
    if k.dim() == 0 or k.numel() == 0:
        raise ValueError(f"k is a tensor of shape {tuple(k.shape)}; it must have one entry per row of the batch")
    smallest, largest = int(k.min()), int(k.max())
    if smallest < 1 or largest > num_experts:
        raise ValueError(
            f"k has entries from {smallest} to {largest}; all must be from 1 to num_experts = {num_experts}"
        )


def set_k_per_row(layers: Sequence[Any], k: Tensor) -> None:
    """Gives all SMoE layers k; a ValueError before any is changed if one can't have it. See ``smoe.activated``."""
    for layer in layers:
        check_k_per_row(k, layer.num_experts)
        if layer.engine == "fastmoe":
            raise ValueError("k is a tensor, which engine 'fastmoe' can't take; use engine 'torch' or one k")
        for router in layer.routers:
            if "k_per_token" not in inspect.signature(router.forward).parameters:
                raise ValueError(f"k is a tensor, but {type(router).__name__}.forward has no argument k_per_token")
    largest = int(k.max())
    for layer in layers:
        # Ranks that share experts must agree on top_k, and have rows of their own.
        layer.top_k, layer.k_per_row = largest if layer.dispatch is None else layer.num_experts, k


def k_of_tokens(k: Tensor, x: Tensor) -> Tensor:
    """The k of every token, (T,) int64, on the device of x.

    Args:
        k: the leading dimensions of x, (batch,) for one k per row or (batch, length) for one per token.
        x: (batch, ..., d) with T tokens in all; or (T, d), if a model flattens its batch, row after row.

    Raises:
        ValueError: k does not fit x, or x is traced for export: the graph would keep this batch's k.
    """
    compiling = torch.compiler.is_compiling()
    if torch.compiler.is_exporting() or (not compiling and torch.jit.is_tracing()):
        raise ValueError("k is a tensor, which an exported graph would keep for every batch; export with one k")
    k, tokens = k.to(x.device, torch.int64), x.shape[:-1]
    if k.shape == tokens[: k.dim()]:
        return k.view(*k.shape, *[1] * (len(tokens) - k.dim())).expand(tokens).reshape(-1)
    if len(tokens) == 1 and tokens[0] % k.numel() == 0:
        return k.reshape(-1).repeat_interleave(tokens[0] // k.numel(), output_size=tokens[0])
    raise ValueError(
        f"k has shape {tuple(k.shape)}, which does not fit an x of shape {tuple(x.shape)}; it must be the first "
        "dimensions of x, the batch first"
    )
