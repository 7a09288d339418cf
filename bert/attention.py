"""Attention of BERT and RoBERTa: PyTorch's ``scaled_dot_product_attention``, or plain matrix products.

On a CPU in bfloat16 the backward pass of PyTorch's kernel is slow for short sequences, so their training uses products;
``python -m benchmarks.attention`` measures both (figures in results/attention.json). Transformers has products too, its
"eager" attention, which copies the scores to float32 and back under autocast.
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
LONGEST = 256  # tokens of a sequence up to which a training step is faster with products, on a CPU in bfloat16


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

    ``attention_mask``: None, or booleans that spread to (B, H, T, T), true where a query sees a key; a query sees at
    least one. What else Transformers can ask for (a causal layer, a mask of numbers, a bias of positions) goes to its
    own ``sdpa_attention_forward``. The second value stands for the attention weights, which are not kept.
    """
    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST
    trained = torch.is_grad_enabled()  # the forward pass alone is faster with PyTorch's kernel
    plain = not getattr(module, "is_causal", True) and all(value is None for value in options.values())
    if short and trained and plain and (attention_mask is None or attention_mask.dtype == torch.bool):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return by_products(query, key, value, attention_mask, scaling, dropout), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)


def by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0
) -> Tensor:
    """The same as plain matrix products, in the dtype of ``query``."""
    scores = (query * scaling) @ key.transpose(2, 3)
    if mask is not None:  # added, not filled in, so that backward has nothing to do for it
        hidden = torch.finfo(scores.dtype).min
        scores = scores.add_(scores.new_zeros(mask.shape).masked_fill_(~mask, hidden))
    # Autocast would copy the scores to float32 and back. PyTorch's softmax adds up in float32 by itself.
    with torch.autocast(query.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    if dropout:
        weights = drop(weights, dropout)
    return (weights @ value).transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
