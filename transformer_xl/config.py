"""What a Transformer-XL run is made of: one flat dataclass, filled from configs/{scale}.yaml, a YAML and flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from smoe import get_method
from smoe.router import ROUTERS
from smoe.run.method_config import MethodConfig, at_least
from transformer_xl.model import TransformerXL, TransformerXLConfig

CONFIG_DIR = Path(__file__).parent / "configs"

_LARGEST_SEED = 2**53  # the routers' seeds are a thousand times that, and must fit into 64 bits


@dataclass(frozen=True)
class TrainConfig(MethodConfig):
    """One training run of a Transformer-XL.

    Args:
        method: a row of Table 1: dense_dropout, dense_concrete_dropout, dense_dropblock, thor, smoe, smoe_dropout
        run_dir: the folder the run lives in
        data: the folder with train.bin, valid.bin and test.bin
        scale: paper, cpu (two cores, minutes), smoke (seconds), or auto: paper with a CUDA device, else cpu
        seed: of weights, routers, dropout
        resume: continue the run in run_dir from its newest good checkpoint; starts it if there is none
        precision: bf16, fp32, or auto: bf16 where the device has instructions for it
        num_layers: transformer layers
        d_model: model width
        num_heads: attention heads
        d_head: width of a head
        d_hidden: width of the MLP, all experts together
        dropout: after attention and MLP, on embeddings, and inside a dense MLP
        attention_dropout: on attention weights
        num_experts: N, the experts an MLP is cut into
        k_min: activated experts at the start; null: the method's own
        k_max: activated experts at the end; null: the method's own
        schedule: how k moves from k_min to k_max; null: the method's own
        router: random, learned, uniform or hash; null: the method's own
        score: how router logits become weights
        output_scale: one multiplier on an SMoE layer's output: a number, k or num_experts
        balance_weight: coefficient of the load-balancing loss; null: the method's own
        consistency_weight: coefficient of THOR's consistency loss; null: the method's own
        steps: optimizer steps
        batch_size: sequences a step, over all processes
        tgt_len: tokens of a training segment
        mem_len: tokens of memory when training
        learning_rate: of Adam, decaying to 0 with half a cosine
        warmup_steps: steps in which the learning rate rises to its full value
        clip: largest norm of the gradient
        eval_interval: steps between evaluations on valid; each writes a checkpoint
        save_interval: steps between checkpoints; null: eval_interval
        eval_batch_size: sequences in an evaluation
        eval_tgt_len: tokens of an evaluation segment
        eval_mem_len: tokens of memory when evaluating
        eval_tokens: bytes of valid and of test to evaluate on; null: all of them
        sweep: the k of the final sweep; those above num_experts are left out
        log_interval: steps between lines in metrics.jsonl
        progress: show a progress bar
    """

    method: str
    run_dir: str
    data: str = "data/enwik8"
    scale: str = "auto"
    scale_reason: str = ""
    seed: int = 1
    resume: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 8
    d_head: int = 64
    d_hidden: int = 8192
    dropout: float = 0.1
    attention_dropout: float = 0.0

    num_experts: int = 16
    k_min: int | None = None
    k_max: int | None = None
    schedule: str | None = None
    router: str | None = None
    score: str = "softmax_after_topk"
    output_scale: float | str = 1
    balance_weight: float | None = None
    consistency_weight: float | None = None

    steps: int = 400_000
    batch_size: int = 22
    tgt_len: int = 512
    mem_len: int = 512
    learning_rate: float = 2.5e-4
    warmup_steps: int = 0
    clip: float = 0.25

    eval_interval: int = 4000
    save_interval: int | None = None
    eval_batch_size: int = 10
    eval_tgt_len: int = 128
    eval_mem_len: int = 896
    eval_tokens: int | None = None
    sweep: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    log_interval: int = 200
    progress: bool = True

    def __post_init__(self) -> None:
        get_method(self.method)
        for name in (
            "steps", "batch_size", "tgt_len", "eval_interval", "eval_batch_size", "eval_tgt_len", "log_interval",
        ):  # fmt: skip
            at_least(name, getattr(self, name), 1)
        for name in ("mem_len", "eval_mem_len", "warmup_steps", "seed"):
            at_least(name, getattr(self, name), 0)
        if self.seed > _LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}; it must be at most {_LARGEST_SEED}")
        if self.save_interval is not None:
            at_least("save_interval", self.save_interval, 1)
        if self.eval_tokens is not None and self.eval_tokens < self.eval_batch_size:
            raise ValueError(
                f"eval_tokens is {self.eval_tokens}; it must be at least eval_batch_size = {self.eval_batch_size}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0")
        self.model_config()
        self.check_method(ROUTERS)

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

        def make(layer: int) -> nn.Module:
            seed = {"seed": 1000 * self.seed + layer} if method.routed else {}
            return method.make_mlp(self.d_model, self.d_hidden, dropout=self.dropout, **options, **seed)

        return make
