"""What the configurations of both trainers share: the run, the method, its k, and what may be asked of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from smoe.engine import ENGINES, resolve_engine
from smoe.experts import check_divisible
from smoe.layer import check_output_scale
from smoe.methods import METHODS, Method, get_method
from smoe.router import SCORES
from smoe.run.precision import resolve_precision
from smoe.schedule import MODES, k_at

# What may differ when a run is resumed: where things are and how often they are said, nothing that changes numbers.
MAY_CHANGE = ("data", "scale", "save_interval", "log_interval", "progress")
MAY_CHANGE += ("engine", "expert_parallel", "fsdp", "process_timeout")

PROCESS_TIMEOUT = 600.0  # seconds

_LARGEST_SEED = 2**53  # the routers' seeds are a thousand times that, and must fit into 64 bits


@dataclass(frozen=True)
class TrainerConfig:
    """Base of a trainer's configuration, which adds ``data``, the sizes of the model, ``steps``, ``batch_size``,
    ``learning_rate``, ``clip``, ``eval_interval``, ``eval_batch_size`` and ``log_interval``.

    Args:
        method: a row of Table 1: dense_dropout, dense_concrete_dropout, dense_dropblock, thor, smoe, smoe_dropout
        run_dir: the folder the run lives in
        scale: paper, cpu (two cores, minutes), smoke (seconds), or auto: paper with a CUDA device, else cpu
        seed: of weights, routers, data order, masks, dropout
        resume: continue the run in run_dir from its newest good checkpoint; starts it if there is none
        precision: bf16, fp32, or auto: bf16 where the device has instructions for it
        dropout: after attention and MLP, on embeddings, and inside a dense MLP
        num_experts: N, the experts an MLP is cut into
        k_min: activated experts at the start; null: the method's own
        k_max: activated experts at the end; null: the method's own
        schedule: how k moves from k_min to k_max; null: the method's own
        router: random, learned, uniform or (Transformer-XL) hash; null: the method's own
        score: how router logits become weights
        output_scale: one multiplier on an SMoE layer's output: a number, k or num_experts
        balance_weight: coefficient of the load-balancing loss; null: the method's own
        consistency_weight: coefficient of THOR's consistency loss; null: the method's own
        warmup_steps: steps in which the learning rate rises to its full value
        save_interval: steps between checkpoints; null: eval_interval
        sweep: the k of the final sweep; those above num_experts are left out
        progress: show a progress bar
        engine: what computes the experts: torch, fastmoe (needs fmoe and CUDA), or auto
        expert_parallel: processes that share the experts of a layer; 1: each has all of them
        fsdp: shard parameters, gradients and optimizer state over the processes, for a model that doesn't fit a device
        process_timeout: seconds that a process waits for another before it gives up
    """

    method: str
    run_dir: str
    scale: str = "auto"
    scale_reason: str = ""
    seed: int = 1
    resume: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    dropout: float = 0.1

    num_experts: int = 16
    k_min: int | None = None
    k_max: int | None = None
    schedule: str | None = None
    router: str | None = None
    score: str = "softmax_after_topk"
    output_scale: float | str = 1
    balance_weight: float | None = None
    consistency_weight: float | None = None

    warmup_steps: int = 0
    save_interval: int | None = None
    sweep: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    progress: bool = True

    engine: str = "auto"
    expert_parallel: int = 1
    fsdp: bool = False
    process_timeout: float = PROCESS_TIMEOUT

    def check(self, routers: tuple[str, ...]) -> None:
        """ValueError in one line for a field that can't be used; ``routers`` are those the model can have."""
        get_method(self.method)
        for name in ("steps", "batch_size", "eval_interval", "eval_batch_size", "log_interval"):
            at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            at_least(name, getattr(self, name), 0)
        if self.seed > _LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}; it must be at most {_LARGEST_SEED}")
        if self.save_interval is not None:
            at_least("save_interval", self.save_interval, 1)
        at_least("expert_parallel", self.expert_parallel, 1)
        for name in ("learning_rate", "clip", "process_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        self._check_method(routers)

    def _check_method(self, routers: tuple[str, ...]) -> None:
        method = get_method(self.method)
        for name in ("balance_weight", "consistency_weight"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not self.sweep or any(k < 1 for k in self.sweep):
            raise ValueError(f"sweep is {list(self.sweep)}; it must list at least one k, each at least 1")
        one_of("score", self.score, SCORES)
        if self.router is not None:
            one_of("router", self.router, routers)
        if self.schedule is not None:
            one_of("schedule", self.schedule, MODES)
        one_of("engine", self.engine, ENGINES)
        check_output_scale(self.output_scale)
        self._check_routed() if method.routed else self._check_dense(method)

    def _check_routed(self) -> None:
        check_divisible(self.d_hidden, self.num_experts)
        if self.num_experts % self.expert_parallel:
            raise ValueError(
                f"expert_parallel is {self.expert_parallel}; it must divide num_experts = {self.num_experts}"
            )
        for name in ("k_min", "k_max"):
            k = getattr(self, name)
            if k is not None and not 1 <= k <= self.num_experts:
                raise ValueError(f"{name} is {k}; it must be from 1 to num_experts = {self.num_experts}")
        k_min, k_max, _ = self.k_schedule()
        if k_min > k_max:
            raise ValueError(f"k_min is {k_min}, above k_max = {k_max}; it must be 1 <= k_min <= k_max")
        if not self.sweep_ks():
            raise ValueError(
                f"sweep is {list(self.sweep)}; at least one k must be no larger than num_experts = {self.num_experts}"
            )

    def _check_dense(self, method: Method) -> None:
        """What only experts have must not be asked of a model without any: the run would be named after it."""
        for name in (
            "k_min",
            "k_max",
            "schedule",
            "router",
            "score",
            "output_scale",
            "balance_weight",
            "engine",
            "expert_parallel",
        ):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {value!r}, but {self.method} has no experts; leave {name} out")
        if method.dropout == "concrete" and self.dropout == 0:
            raise ValueError(f"dropout is 0.0; {self.method} learns its rate and must start above 0")

    def resolved(self, device: torch.device) -> TrainerConfig:
        """With precision and engine as what they come to on this device and machine; ValueError if fmoe can't run."""
        changes = {"precision": resolve_precision(self.precision, device)}
        if self.get_method().routed:
            changes["engine"] = resolve_engine(self.engine)
        return dataclasses.replace(self, **changes)

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


def at_least(name: str, value: float, least: float) -> None:
    """ValueError unless ``value`` is at least ``least``."""
    if not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
