"""Attention of BERT and RoBERTa: PyTorch's fused kernel, or plain matrix products where those are faster.

On a CPU in bfloat16 the backward pass of the fused kernel is slow for short sequences. For 64 sequences of 4 heads of
width 32 on one core, forward and backward take 36 ms with it and 9 ms without at 64 tokens; at 512 tokens the fused
kernel is ahead (``python -m benchmarks.attention``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smoe.dropout import dropout as drop

NAME = "sdpa_or_products"  # what Transformers knows it by, as ``attn_implementation``
LONGEST = 192  # tokens of a sequence up to which products are faster on a CPU in bfloat16


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``query``, ``key`` and ``value`` (B, H, T, d_head) -> (B, T, H, d_head), as Transformers calls it.

    ``attention_mask``: None, or booleans that spread to (B, H, T, T), true where a query sees a key. The second value
    stands for the attention weights, which are not kept.
    """
    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST
    if not short:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    if dropout:
        weights = drop(weights, dropout)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
