"""What a Transformer-XL run is made of: one flat dataclass, filled from configs/{scale}.yaml, a YAML and flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from smoe.router import ROUTERS
from smoe.run.trainer_config import TrainerConfig, at_least
from transformer_xl.model import TransformerXL, TransformerXLConfig

CONFIG_DIR = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class TrainConfig(TrainerConfig):
    """One training run of a Transformer-XL.

    Args:
        data: the folder with train.bin, valid.bin and test.bin
        num_layers: transformer layers
        d_model: model width
        num_heads: attention heads
        d_head: width of a head
        d_hidden: width of the MLP, all experts together
        attention_dropout: on attention weights
        steps: optimizer steps
        batch_size: sequences a step, over all processes
        tgt_len: tokens of a training segment
        mem_len: tokens of memory when training
        learning_rate: of Adam, decaying to 0 with half a cosine
        clip: largest norm of the gradient
        eval_interval: steps between evaluations on valid; each writes a checkpoint
        eval_batch_size: sequences in an evaluation
        eval_tgt_len: tokens of an evaluation segment
        eval_mem_len: tokens of memory when evaluating
        eval_tokens: bytes of valid and of test to evaluate on; null: all of them
        log_interval: steps between lines in metrics.jsonl
    """

    data: str = "data/enwik8"

    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 8
    d_head: int = 64
    d_hidden: int = 8192
    attention_dropout: float = 0.0

    steps: int = 400_000
    batch_size: int = 22
    tgt_len: int = 512
    mem_len: int = 512
    learning_rate: float = 2.5e-4
    clip: float = 0.25

    eval_interval: int = 4000
    eval_batch_size: int = 10
    eval_tgt_len: int = 128
    eval_mem_len: int = 896
    eval_tokens: int | None = None
    log_interval: int = 200

    def __post_init__(self) -> None:
        for name in ("tgt_len", "eval_tgt_len"):
            at_least(name, getattr(self, name), 1)
        for name in ("mem_len", "eval_mem_len"):
            at_least(name, getattr(self, name), 0)
        self.model_config()
        self.check(ROUTERS)
        if self.eval_tokens is not None and self.eval_tokens < self.eval_batch_size:
            raise ValueError(
                f"eval_tokens is {self.eval_tokens}; it must be at least eval_batch_size = {self.eval_batch_size}"
            )

    def model_config(self) -> TransformerXLConfig:
        """The sizes of the model alone."""
        names = ("num_layers", "d_model", "num_heads", "d_head", "d_hidden", "dropout", "attention_dropout")
        return TransformerXLConfig(**{name: getattr(self, name) for name in names})

    def build_model(self) -> TransformerXL:
        """A fresh model; draws from PyTorch's global generator, the fixed routers from ``seed`` alone."""
        return TransformerXL(self.model_config(), self.mlp_builder())

    def mlp_builder(self) -> Callable[[int], nn.Module]:
        """What builds the MLP of each layer."""
        config, method = self.model_config(), self.get_method()
        options: dict = {}
        if method.routed:
            options = {"top_k": self.k_at(0), "score": self.score, "output_scale": self.output_scale}
            options |= {"router": self.router, "vocab_size": config.vocab_size, "num_experts": self.num_experts}
            options["engine"] = self.engine

        def make(layer: int) -> nn.Module:
            seed = {"seed": 1000 * self.seed + layer} if method.routed else {}
            return method.make_mlp(self.d_model, self.d_hidden, dropout=self.dropout, **options, **seed)

        return make
