"""An encoder that scores a sequence by its first token, as Hugging Face's ``BertFor...`` classes do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert.finetune import encode
from smoe.dropout import Dropout


class PooledOutput(NamedTuple):
    """``loss``: mean nats per example; ``logits (B, answers)``; both float32."""

    loss: Tensor
    logits: Tensor


class Pooled(nn.Module):
    """A pooler on the first token, and ``outputs`` scores from it."""

    def __init__(self, encoder: PreTrainedModel, outputs: int, dropout: float, init_std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooler = nn.Linear(encoder.config.hidden_size, encoder.config.hidden_size)
        self.dropout = Dropout(dropout)
        self.score = nn.Linear(encoder.config.hidden_size, outputs)
        for linear in (self.pooler, self.score):
            nn.init.normal_(linear.weight, 0.0, init_std)
            nn.init.zeros_(linear.bias)

    def scores(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """``(B, T)`` ids, padded at the end -> ``(B, outputs)``, float32."""
        hidden = encode(self.encoder, input_ids, **inputs)
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        return self.score(self.dropout(pooled)).float()
