"""An encoder that marks the answer in what it reads: where it starts and where it ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert.finetune import encode
from smoe.dropout import Dropout

_NEVER = -1e4  # the logit of a place where no answer starts or ends; finite, so that differences of two are


class SpanOutput(NamedTuple):
    """``loss``: mean over windows of the mean nats of start and end; ``logits (B, 2, T)`` of them; both float32."""

    loss: Tensor
    logits: Tensor


class SpanReader(nn.Module):
    """A score to start and one to end at each token, as ``BertForQuestionAnswering``, over the allowed places."""

    def __init__(self, encoder: PreTrainedModel, dropout: float, init_std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = Dropout(dropout)
        self.score = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.normal_(self.score.weight, 0.0, init_std)
        nn.init.zeros_(self.score.bias)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, allowed: Tensor, spans: Tensor) -> SpanOutput:
        """``input_ids``, ``token_type_ids`` and ``allowed`` (bool: an answer may start or end there) are (B, T), padded
        at the end; ``spans (B, 2)``: first and last token of the answer, 0 and 0 if there is none."""
        hidden = encode(self.encoder, input_ids, token_type_ids=token_type_ids)
        scores = self.score(self.dropout(hidden)).float().transpose(1, 2)
        logits = scores.masked_fill(~allowed[:, None], _NEVER)
        return SpanOutput(F.cross_entropy(logits.flatten(0, 1), spans.flatten()), logits)


class Spans(NamedTuple):
    """The best answer of each window: its ``scores``, ``first`` and ``last`` tokens, all (B,)."""

    scores: Tensor
    first: Tensor
    last: Tensor


def best_spans(logits: Tensor, chunk: Tensor, words: Tensor, max_tokens: int) -> Spans:
    """The span of at most ``max_tokens`` tokens of the chunk, or the word (yes, no), that scores most.

    A span's score is its start's plus its end's, less that of the first token, which stands for no answer; so spans of
    different windows can be compared.

    Args:
        logits: (B, 2, T). chunk: (B, T) bool, tokens of the context. words: (B, W, 2), first and last token of each.
    """
    starts, ends = logits.masked_fill(~chunk[:, None], -torch.inf).unbind(1)
    length = starts.shape[1]
    # (B, D, T): the span from each place to the one d after it.
    ends = F.pad(ends, (0, max_tokens - 1), value=-torch.inf).unfold(1, length, 1)
    spans, place = (starts[:, None] + ends).flatten(1).max(1)
    first = place % length
    last = first + place.div(length, rounding_mode="floor")
    said = logits[:, 0].gather(1, words[..., 0]) + logits[:, 1].gather(1, words[..., 1])
    said, which = said.max(1)
    word = words[torch.arange(len(words)), which]
    is_word = said >= spans
    scores = torch.where(is_word, said, spans) - logits[:, :, 0].sum(1)
    return Spans(scores, torch.where(is_word, word[:, 0], first), torch.where(is_word, word[:, 1], last))
