"""Writes the equation of a word problem, token by token, while it attends to the encoded problem.

A token is one of a fixed list of symbols (operators, constants, the end), or a slot: a number of the problem. A slot
has no embedding of its own: it is what the encoder says of the place in the text where that number is, as in pointer
networks (Vinyals et al. 2015) and other solvers of word problems (Xie and Sun 2019).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

END = 0  # the symbol before and after every equation
_NEVER = -1e4  # a logit whose softmax is 0; finite, so that differences of logits stay numbers


class Problems(NamedTuple):
    """``hidden (B, T, d)``: the encoded texts; ``padding (B, T)``: true where there is none; ``slots (B, S)``: where in
    the text each number is, -1 where a problem has fewer."""

    hidden: Tensor
    padding: Tensor
    slots: Tensor


class EquationDecoder(nn.Module):
    """A transformer decoder. Ids of tokens: the symbols from 0 on, then slot i at ``num_symbols + i``."""

    def __init__(
        self, d_model: int, num_heads: int, num_layers: int, num_symbols: int, max_length: int, dropout: float
    ) -> None:
        """``max_length``: tokens of the longest equation, its end included."""
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, d_model)
        self.positions = nn.Embedding(max_length, d_model)
        self.slot = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        options = {"dim_feedforward": 4 * d_model, "dropout": dropout, "activation": "gelu"}
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(d_model, num_heads, **options, batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    @property
    def max_length(self) -> int:
        return self.positions.num_embeddings

    def forward(self, problems: Problems, written: Tensor) -> Tensor:
        """Logits (B, L, num_symbols + S), float32, of what comes after each token of ``written`` (B, L).

        ``written`` begins with END."""
        batch, length = written.shape
        places = problems.slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, problems.hidden.shape[-1])
        slots = self.slot(problems.hidden.gather(1, places))
        symbols = self.symbols.weight.to(slots.dtype).expand(batch, -1, -1)
        tokens = torch.cat((symbols, slots), dim=1)  # (B, num_symbols + S, d): what a token is in each problem
        x = tokens.gather(1, written.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        x = self.dropout(x + self.positions.weight[:length])
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, problems.hidden, tgt_mask=later, memory_key_padding_mask=problems.padding)
        logits = (self.norm(x) @ tokens.transpose(1, 2)).float() / math.sqrt(x.shape[-1])
        absent = F.pad(problems.slots < 0, (self.symbols.num_embeddings, 0))
        return logits.masked_fill(absent.unsqueeze(1), _NEVER)

    def write(self, problems: Problems) -> Tensor:
        """The equations (B, max_length) that the likeliest next token gives each time, filled up with END."""
        batch = len(problems.hidden)
        written = torch.full((batch, 1), END, device=problems.hidden.device)
        ended = torch.zeros(batch, dtype=torch.bool, device=written.device)
        for _ in range(self.max_length):
            token = self(problems, written)[:, -1].argmax(-1).masked_fill(ended, END)
            written = torch.cat((written, token.unsqueeze(1)), dim=1)
            ended = ended | (token == END)
            if ended.all():
                break
        return F.pad(written[:, 1:], (0, self.max_length + 1 - written.shape[1]), value=END)
