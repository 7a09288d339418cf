"""FLOPs of a Transformer-XL."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from smoe.flops import TopK, count
from transformer_xl.model import TransformerXL


def evaluation_flops(model: TransformerXL, k: TopK, *, batch: int, tgt_len: int, mem_len: int) -> dict[str, int]:
    """The cost of one evaluation pass: ``paper`` and ``true`` FLOPs and the sizes of ``smoe.flops.FlopCount``.

    Args:
        model: on any device; on ``meta`` it need not even be allocated.
        k: activated experts: one number, one per SMoE layer, or None for each layer's own.
        batch, tgt_len, mem_len: sequences, tokens of each and remembered tokens.

    Raises:
        ValueError: k does not fit.
    """
    counted = dataclasses.asdict(count(model, meta_inputs(model, batch, tgt_len, mem_len), k))
    # Table 1 counts the released model, which projects queries of remembered tokens too, and encodes one position less.
    more_rows = batch * mem_len - 1
    c = model.config
    paper = counted.pop("paper_linear") + c.num_layers * 2 * more_rows * c.d_model * c.num_heads * c.d_head
    return {"paper": paper, **counted}


def meta_inputs(model: TransformerXL, batch: int, tgt_len: int, mem_len: int) -> dict[str, Any]:
    """What the model is called with in an evaluation or a training step, of shapes alone."""
    ids = torch.empty(batch, tgt_len, dtype=torch.int64, device="meta")
    shape = (len(model.layers), batch, mem_len, model.config.d_model)
    memory = torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta") if mem_len else None
    return {"input_ids": ids, "targets": ids, "memory": memory}
