"""FLOPs of an evaluation pass and of a training step of a Transformer-XL."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from smoe.flops import TopK, count, count_step
from smoe.methods import Method
from transformer_xl.model import TransformerXL


def evaluation_flops(model: TransformerXL, k: TopK, *, batch: int, tgt_len: int, mem_len: int) -> dict[str, int]:
    """The cost of one evaluation pass: ``paper`` and ``true`` FLOPs and the sizes of ``smoe.flops.FlopCount``.

    Args:
        model: on any device; on ``meta`` it need not even be allocated.
        k: activated experts: one number, one per SMoE layer, or None for each layer's own.
        batch, tgt_len, mem_len: sequences, tokens of each and remembered tokens.

    Raises:
        ValueError: k or a length does not fit.
    """
    counted = dataclasses.asdict(count(model, _inputs(model, batch, tgt_len, mem_len), k))
    # Table 1 counts the released model, which projects queries of remembered tokens too, and encodes one position less.
    more_rows = batch * mem_len - 1
    c = model.config
    paper = counted.pop("paper_linear") + c.num_layers * 2 * more_rows * c.d_model * c.num_heads * c.d_head
    return {"paper": paper, **counted}


def step_flops(
    model: TransformerXL,
    method: str | Method,
    k: TopK,
    *,
    batch: int,
    tgt_len: int,
    mem_len: int,
    **weights: float | None,
) -> int:
    """True FLOPs of a training step, forward and backward (``smoe.flops.count_step``).

    Args:
        method: whose loss is minimised.
        weights: ``consistency_weight`` and ``balance_weight``, which replace the method's own.
        model, k, batch, tgt_len, mem_len: as in :func:`evaluation_flops`.
    """
    return count_step(model, method, _inputs(model, batch, tgt_len, mem_len), k, **weights)


def _inputs(model: TransformerXL, batch: int, tgt_len: int, mem_len: int) -> dict[str, Any]:
    for name, value, least in (("batch", batch, 1), ("tgt_len", tgt_len, 1), ("mem_len", mem_len, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    ids = torch.empty(batch, tgt_len, dtype=torch.int64, device="meta")
    shape = (len(model.layers), batch, mem_len, model.config.d_model)
    memory = torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta") if mem_len else None
    return {"input_ids": ids, "targets": ids, "memory": memory}
