"""What every task of the Transformer-XL can be told: its sizes, beside what ``smoe.train.config`` has for all tasks."""

from __future__ import annotations

from dataclasses import dataclass

from smoe.train.config import TrainConfig
from transformer_xl.model import TransformerXL, TransformerXLConfig


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """A run with a Transformer-XL.

    Args:
        d_head: width of a head
    """

    d_head: int = 64

    def __post_init__(self) -> None:
        self.sizes()
        super().__post_init__()

    def sizes(self) -> TransformerXLConfig:
        """The sizes of the model alone."""
        names = ("num_layers", "d_model", "num_heads", "d_head", "d_hidden", "dropout", "attention_dropout")
        return TransformerXLConfig(**{name: getattr(self, name) for name in names})

    def build_model(self) -> TransformerXL:
        """A fresh model; draws from PyTorch's global generator, the fixed routers from ``seed`` alone."""
        sizes = self.sizes()
        return TransformerXL(sizes, lambda layer: self.make_mlp(layer, vocab_size=sizes.vocab_size))
