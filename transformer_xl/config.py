"""What a training of the Transformer-XL can be told, beside what ``smoe.train.config`` has for every training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from smoe.options import option
from smoe.train.config import TrainConfig
from transformer_xl.model import TransformerXL, TransformerXLConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """Any task with a Transformer-XL."""

    expert_dropout: float = 0.1  # as released: in every expert, after ReLU
    d_head: int = option(64, "width of a head")
    d_hidden_share: float | None = option(
        None, "narrower MLPs, of this share of d_hidden; the record has their d_hidden, and null here"
    )

    def __post_init__(self) -> None:
        if self.d_hidden_share is not None:
            width = self.d_hidden * self.d_hidden_share
            if not width >= 1 or width % 1:
                allowed = f"its product with d_hidden = {self.d_hidden} must be a whole number of at least 1"
                raise ValueError(f"d_hidden_share is {self.d_hidden_share}; {allowed}")
            # Applied once: a configuration that is copied or read back keeps its width.
            object.__setattr__(self, "d_hidden", int(width))
            object.__setattr__(self, "d_hidden_share", None)
        self.sizes()
        super().__post_init__()

    def sizes(self) -> TransformerXLConfig:
        """The sizes of the model alone."""
        names = ("num_layers", "d_model", "num_heads", "d_head", "d_hidden", "attention_dropout")
        return TransformerXLConfig(**{name: getattr(self, name) for name in names}, dropout=self.residual_rate())

    def build_model(self) -> TransformerXL:
        """A fresh model; draws from PyTorch's global generator, the fixed routers from ``seed`` alone."""
        sizes = self.sizes()
        return TransformerXL(sizes, lambda layer: self.make_mlp(layer, vocab_size=sizes.vocab_size))


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(RunConfig):
    """One training run of a Transformer-XL as a language model."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "language_model.yaml"

    data: str = option("data/enwik8", "the folder with train.bin, valid.bin and test.bin")
    tgt_len: int = option(512, "tokens of a training segment", at_least=1)
    mem_len: int = option(512, "tokens of memory when training", at_least=0)
    eval_tgt_len: int = option(128, "tokens of an evaluation segment", at_least=1)
    eval_mem_len: int = option(896, "tokens of memory when evaluating", at_least=0)
    eval_tokens: int | None = option(None, "bytes of valid and of test to evaluate on; null: all of them")
