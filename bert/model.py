"""Hugging Face's BERT and RoBERTa for masked language modelling, with the MLP of any method in every layer.

What differs from the classes' defaults:

- RoBERTa's layer norms have an epsilon of 1e-5, as the published checkpoint has (``layer_norm_eps`` in roberta-base's
  config.json, and the default of PyTorch, with which fairseq trained it); ``RobertaConfig`` starts from BERT's 1e-12.
- A dense MLP drops hidden units between its two linear layers (``DenseMLP``). Hugging Face's BERT has no dropout there.
  Table 1's rows "Dense w. Dropout", "w. Concrete Dropout" and "w. DropBlock" differ in this dropout alone, so it stays;
  ``dropout=0`` with ``residual_dropout=0.1`` is Hugging Face's model.
- Trained on short sequences on a CPU in bfloat16, attention is computed by products whose scores are rounded to
  bfloat16 (``bert/attention.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from bert import attention
from bert.config import RunConfig
from bert.data import Vocabulary
from smoe import SMoE
from smoe.dropout import Dropout
from smoe.methods import DenseMLP

SINUSOID_AMPLITUDE = 0.1


class MaskedLMOutput(NamedTuple):
    """`loss`: mean nats per predicted token, float32; `logits (B x M, V)` of the predicted tokens, float32."""

    loss: Tensor
    logits: Tensor


class MaskedLM(nn.Module):
    """A masked language model that computes its head where there is something to predict, and nowhere else.

    The loss is the one of the model itself with labels at those positions; `model` is that model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor) -> MaskedLMOutput:
        """`input_ids (B, T)`, `positions (B, M)` in 0..T-1, `targets (B, M)`, -100 where one doesn't count."""
        hidden = self.model.base_model(input_ids=input_ids).last_hidden_state  # (B, T, d)
        predicted = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        head = self.model.cls if hasattr(self.model, "cls") else self.model.lm_head
        logits = head(predicted).float().flatten(0, 1)
        return MaskedLMOutput(F.cross_entropy(logits, targets.flatten()), logits)


def build_model(config: RunConfig, vocabulary: Vocabulary) -> PreTrainedModel:
    """A fresh model; draws from PyTorch's global generator, the fixed routers from ``config.seed`` alone.

    In each layer the MLP of the method takes the place of the two linear layers and the activation; the dropout after
    them, the residual and the layer norm are the model's own.
    """
    model = _dense(config, vocabulary)
    for i, layer in enumerate(model.base_model.encoder.layer):
        layer.intermediate = config.make_mlp(i, activation="gelu")
        layer.output.dense = nn.Identity()
        _initialise(layer.intermediate, config.init_std)
        if config.key_init == "query":
            projections = layer.attention.self
            projections.key.load_state_dict(projections.query.state_dict())
    if config.position_init == "sinusoid":
        _to_sinusoids(model.base_model.embeddings.position_embeddings)
    _use_fast_dropout(model)
    return model


def _dense(config: RunConfig, vocabulary: Vocabulary) -> PreTrainedModel:
    sizes = {
        "vocab_size": vocabulary.size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        # Its MLPs are about to be replaced; a width of 1 spares drawing weights that nobody needs.
        "intermediate_size": 1,
        "hidden_dropout_prob": config.residual_rate(),
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.start,
        "eos_token_id": vocabulary.end,
        "attn_implementation": attention.NAME,
    }
    if config.model == "bert":
        model = BertForMaskedLM(BertConfig(max_position_embeddings=config.seq_len, **sizes))
    else:
        # RoBERTa counts positions from the padding's id + 1.
        positions = config.seq_len + vocabulary.pad + 1
        model = RobertaForMaskedLM(
            RobertaConfig(max_position_embeddings=positions, type_vocab_size=1, layer_norm_eps=1e-5, **sizes)
        )
    model.config.intermediate_size = config.d_hidden
    return model


@torch.no_grad()
def _initialise(mlp: nn.Module, std: float) -> None:
    """Weights as the model draws its own: N(0, std), biases 0."""
    if isinstance(mlp, SMoE):
        mlp.reset_parameters(std)
        return
    assert isinstance(mlp, DenseMLP)
    for linear in (mlp.up, mlp.down):
        nn.init.normal_(linear.weight, 0.0, std)
        nn.init.zeros_(linear.bias)


@torch.no_grad()
def _to_sinusoids(positions: nn.Embedding) -> None:
    """Fill the table with sines and cosines of the position (Vaswani et al. 2017, 3.5), times SINUSOID_AMPLITUDE.

    Neighbours are alike then, which normal numbers must learn first. The row of padding stays 0.
    """
    count, width = positions.weight.shape
    frequencies = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(count).unsqueeze(1) * frequencies
    sinusoids = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
    positions.weight.copy_(SINUSOID_AMPLITUDE * sinusoids)
    if positions.padding_idx is not None:
        positions.weight[positions.padding_idx] = 0


def with_positions(table: Tensor, positions: int, reserved: int) -> Tensor:
    """A table of position embeddings (reserved + P, d) for other ``positions``: (reserved + positions, d).

    Where there are more than P, those of ``table`` are repeated, so that neighbours stay as they were learned.
    """
    learned = table[reserved:]
    repeated = learned.repeat(-(-positions // len(learned)), 1)[:positions]
    return torch.cat((table[:reserved], repeated))


def _use_fast_dropout(model: nn.Module) -> None:
    """Exchange every `nn.Dropout` for the one that is fast on a CPU too."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
