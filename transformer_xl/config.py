"""What a Transformer-XL run is made of: one flat dataclass, filled from configs/{scale}.yaml, a YAML and flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from smoe import METHODS, Method, get_method, k_at
from smoe.experts import check_divisible
from smoe.layer import check_output_scale
from smoe.router import ROUTERS, SCORES
from smoe.schedule import MODES
from transformer_xl.model import TransformerXL, TransformerXLConfig

CONFIG_DIR = Path(__file__).parent / "configs"

_LARGEST_SEED = 2**53  # the routers' seeds are a thousand times that, and must fit into 64 bits


@dataclass(frozen=True)
class TrainConfig:
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
        method = get_method(self.method)
        for name in (
            "steps", "batch_size", "tgt_len", "eval_interval", "eval_batch_size", "eval_tgt_len", "log_interval",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        for name in ("mem_len", "eval_mem_len", "warmup_steps", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.seed > _LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}; it must be at most {_LARGEST_SEED}")
        if self.save_interval is not None:
            _at_least("save_interval", self.save_interval, 1)
        if self.eval_tokens is not None and self.eval_tokens < self.eval_batch_size:
            raise ValueError(
                f"eval_tokens is {self.eval_tokens}; it must be at least eval_batch_size = {self.eval_batch_size}"
            )
        for name in ("balance_weight", "consistency_weight"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0")
        if not self.sweep or any(k < 1 for k in self.sweep):
            raise ValueError(f"sweep is {list(self.sweep)}; it must list at least one k, each at least 1")
        _one_of("score", self.score, SCORES)
        if self.router is not None:
            _one_of("router", self.router, ROUTERS)
        if self.schedule is not None:
            _one_of("schedule", self.schedule, MODES)
        check_output_scale(self.output_scale)
        self.model_config()
        if method.routed:
            check_divisible(self.d_hidden, self.num_experts)
            for name in ("k_min", "k_max"):
                k = getattr(self, name)
                if k is not None and not 1 <= k <= self.num_experts:
                    raise ValueError(f"{name} is {k}; it must be from 1 to num_experts = {self.num_experts}")
            k_min, k_max, _ = self.k_schedule()
            if k_min > k_max:
                raise ValueError(f"k_min is {k_min}, above k_max = {k_max}; it must be 1 <= k_min <= k_max")
            if not self.sweep_ks():
                raise ValueError(
                    f"sweep is {list(self.sweep)}; at least one k must be no larger than num_experts = "
                    f"{self.num_experts}"
                )
        else:
            self._check_dense(method)

    def _check_dense(self, method: Method) -> None:
        """What only experts have must not be asked of a model without any: the run would be named after it."""
        for name in ("k_min", "k_max", "schedule", "router", "score", "output_scale", "balance_weight"):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {value!r}, but {self.method} has no experts; leave {name} out")
        if method.dropout == "concrete" and self.dropout == 0:
            raise ValueError(f"dropout is 0.0; {self.method} learns its rate and must start above 0")

    def model_config(self) -> TransformerXLConfig:
        """The sizes of the model alone."""
        names = ("num_layers", "d_model", "num_heads", "d_head", "d_hidden", "dropout", "attention_dropout")
        return TransformerXLConfig(**{name: getattr(self, name) for name in names})

    def get_method(self) -> Method:
        """The method's builder, losses and defaults."""
        return METHODS[self.method]

    def k_schedule(self) -> tuple[int, int, str]:
        """(k_min, k_max, mode); what is not given comes from the method."""
        method = self.get_method()
        k_max = method.k_max(self.num_experts) if self.k_max is None else self.k_max
        k_min = min(method.k_min(self.num_experts), k_max) if self.k_min is None else self.k_min
        return k_min, k_max, method.schedule if self.schedule is None else self.schedule

    def k_at(self, step: int) -> int | None:
        """Activated experts at a training step; None for a dense method."""
        if not self.get_method().routed:
            return None
        k_min, k_max, mode = self.k_schedule()
        return k_at(step, self.steps, k_min, k_max, mode, seed=self.seed)

    def eval_k(self) -> int | None:
        """The k that the best checkpoint is chosen by: the largest one training visits. None for a dense method."""
        return self.k_schedule()[1] if self.get_method().routed else None

    def sweep_ks(self) -> list[int | None]:
        """The k of the final sweep; [None] for a dense method."""
        if not self.get_method().routed:
            return [None]
        return sorted({k for k in self.sweep if k <= self.num_experts})

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


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
