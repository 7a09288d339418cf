"""What a BERT or RoBERTa run is made of: one flat dataclass, filled from configs/{scale}.yaml, a YAML and flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smoe import get_method
from smoe.run.method_config import MethodConfig, at_least, one_of

CONFIG_DIR = Path(__file__).parent / "configs"
MODELS = ("bert", "roberta")
# The hash router is not among them: token ids don't reach the MLPs of a Hugging Face model.
ROUTERS = ("random", "learned", "uniform")


@dataclass(frozen=True)
class PretrainConfig(MethodConfig):
    """One pretraining run of a BERT or RoBERTa.

    Args:
        model: bert or roberta
        method: a row of Table 1: dense_dropout, dense_concrete_dropout, dense_dropblock, thor, smoe, smoe_dropout
        run_dir: the folder the run lives in
        data: the folder that data/bookcorpus/prepare.py filled; null: data/bookcorpus/MODEL-SCALE
        scale: paper, cpu (two cores, minutes), smoke (seconds), or auto: paper with a CUDA device, else cpu
        seed: of weights, routers, data order, masks, dropout
        resume: continue the run in run_dir from its newest good checkpoint; starts it if there is none
        precision: bf16, fp32, or auto: bf16 where the device has instructions for it
        num_layers: transformer layers
        d_model: model width
        num_heads: attention heads
        d_hidden: width of the MLP, all experts together; null: d_hidden_bert or d_hidden_roberta
        d_hidden_bert: width of BERT's MLP
        d_hidden_roberta: width of RoBERTa's MLP
        dropout: after attention and MLP, on embeddings, and inside a dense MLP
        attention_dropout: on attention weights
        num_experts: N, the experts an MLP is cut into
        k_min: activated experts at the start; null: the method's own
        k_max: activated experts at the end; null: the method's own
        schedule: how k moves from k_min to k_max; null: the method's own
        router: random, learned or uniform; null: the method's own
        score: how router logits become weights
        output_scale: one multiplier on an SMoE layer's output: a number, k or num_experts
        balance_weight: coefficient of the load-balancing loss; null: the method's own
        consistency_weight: coefficient of THOR's consistency loss; null: the method's own
        steps: optimizer steps
        batch_size: sequences a step, over all processes
        seq_len: tokens of a sequence; a whole number of them makes a block of the data
        mask_share: share of the tokens to predict
        learning_rate: of AdamW, falling linearly to 0
        weight_decay: of AdamW
        warmup_steps: steps in which the learning rate rises to its full value
        clip: largest norm of the gradient
        eval_interval: steps between evaluations on valid; each writes a checkpoint
        save_interval: steps between checkpoints; null: eval_interval
        eval_batch_size: sequences in an evaluation pass
        eval_sequences: sequences of valid and of test to evaluate on; null: all of them
        sweep: the k of the final sweep; those above num_experts are left out
        log_interval: steps between lines in metrics.jsonl
        progress: show a progress bar
    """

    model: Literal["bert", "roberta"]
    method: str
    run_dir: str
    data: str | None = None
    scale: str = "auto"
    scale_reason: str = ""
    seed: int = 1
    resume: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 12
    d_hidden: int | None = None
    d_hidden_bert: int = 6144
    d_hidden_roberta: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1

    num_experts: int = 16
    k_min: int | None = None
    k_max: int | None = None
    schedule: str | None = None
    router: str | None = None
    score: str = "softmax_after_topk"
    output_scale: float | str = 1
    balance_weight: float | None = None
    consistency_weight: float | None = None

    steps: int = 100_000
    batch_size: int = 64
    seq_len: int = 512
    mask_share: float = 0.15
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip: float = 1.0

    eval_interval: int = 5000
    save_interval: int | None = None
    eval_batch_size: int = 8
    eval_sequences: int | None = None
    sweep: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    log_interval: int = 100
    progress: bool = True

    def __post_init__(self) -> None:
        one_of("model", self.model, MODELS)
        get_method(self.method)
        if self.data is None:
            object.__setattr__(self, "data", f"data/bookcorpus/{self.model}-{self.scale}")
        if self.d_hidden is None:
            object.__setattr__(self, "d_hidden", self.d_hidden_bert if self.model == "bert" else self.d_hidden_roberta)
        for name in ("num_layers", "d_model", "num_heads", "d_hidden", "steps", "batch_size", "eval_interval",
                     "eval_batch_size", "log_interval"):  # fmt: skip
            at_least(name, getattr(self, name), 1)
        at_least("seq_len", self.seq_len, 8)
        for name in ("warmup_steps", "seed", "weight_decay"):
            at_least(name, getattr(self, name), 0)
        for name in ("save_interval", "eval_sequences"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide d_model = {self.d_model}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"mask_share is {self.mask_share}; it must be above 0 and below 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        self.check_method(ROUTERS)
