"""What a BERT or RoBERTa run is made of: one flat dataclass, filled from configs/{scale}.yaml, a YAML and flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smoe.run.trainer_config import TrainerConfig, at_least, one_of

CONFIG_DIR = Path(__file__).parent / "configs"
MODELS = ("bert", "roberta")
# The hash router is not among them: token ids don't reach the MLPs of a Hugging Face model.
ROUTERS = ("random", "learned", "uniform")


@dataclass(frozen=True)
class PretrainConfig(TrainerConfig):
    """One pretraining run of a BERT or RoBERTa.

    Args:
        model: bert or roberta
        data: the folder that data/bookcorpus/prepare.py filled; null: data/bookcorpus/MODEL-SCALE
        num_layers: transformer layers
        d_model: model width
        num_heads: attention heads
        d_hidden: width of the MLP, all experts together; null: d_hidden_bert or d_hidden_roberta
        d_hidden_bert: width of BERT's MLP
        d_hidden_roberta: width of RoBERTa's MLP
        attention_dropout: on attention weights
        steps: optimizer steps
        batch_size: sequences a step, over all processes
        seq_len: tokens of a sequence; a whole number of them makes a block of the data
        mask_share: share of the tokens to predict
        learning_rate: of AdamW, falling linearly to 0
        weight_decay: of AdamW
        clip: largest norm of the gradient
        eval_interval: steps between evaluations on valid; each writes a checkpoint
        eval_batch_size: sequences in an evaluation pass
        eval_sequences: sequences of valid and of test to evaluate on; null: all of them
        log_interval: steps between lines in metrics.jsonl
    """

    model: Literal["bert", "roberta"] = field(kw_only=True)
    data: str | None = None

    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 12
    d_hidden: int | None = None
    d_hidden_bert: int = 6144
    d_hidden_roberta: int = 3072
    attention_dropout: float = 0.1

    steps: int = 100_000
    batch_size: int = 64
    seq_len: int = 512
    mask_share: float = 0.15
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    clip: float = 1.0

    eval_interval: int = 5000
    eval_batch_size: int = 8
    eval_sequences: int | None = None
    log_interval: int = 100

    def __post_init__(self) -> None:
        one_of("model", self.model, MODELS)
        if self.data is None:
            object.__setattr__(self, "data", f"data/bookcorpus/{self.model}-{self.scale}")
        if self.d_hidden is None:
            object.__setattr__(self, "d_hidden", self.d_hidden_bert if self.model == "bert" else self.d_hidden_roberta)
        for name in ("num_layers", "d_model", "num_heads", "d_hidden"):
            at_least(name, getattr(self, name), 1)
        at_least("seq_len", self.seq_len, 8)
        at_least("weight_decay", self.weight_decay, 0)
        if self.eval_sequences is not None:
            at_least("eval_sequences", self.eval_sequences, 1)
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide d_model = {self.d_model}")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"mask_share is {self.mask_share}; it must be above 0 and below 1")
        self.check(ROUTERS)
