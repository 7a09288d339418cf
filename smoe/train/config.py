"""What every training can be told: one frozen dataclass, to which each task adds its own fields."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from smoe.engine import Engine, resolve_engine
from smoe.experts import check_divisible
from smoe.layer import check_output_scale
from smoe.methods import METHODS, Method, MethodName, get_method
from smoe.modulize.layers import LayerNames, chosen_layers
from smoe.router import RouterKind, Score
from smoe.schedule import Mode, ks_at
from smoe.train.learning_rate import Decay, learning_rate_at
from smoe.train.precision import resolve_precision

# What only experts have. It must not be asked of a model without any: the run would be named after it.
_ONLY_EXPERTS = ("k_min", "k_max", "schedule", "router", "score", "output_scale", "balance_weight", "layers")
_ONLY_EXPERTS += ("engine", "expert_parallel")
_BOUNDS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}
_LARGEST_SEED = 2**53  # the routers' seeds are a thousand times that, and must fit into 64 bits


def option(default: Any, note: str, **bounds: float) -> Any:
    """A field with its line of ``--help`` and the bounds of its value: ``at_least``, ``at_most``, ``above``, ``below``.

    A field that can be null has no bound on null. A subclass that changes a default need not repeat the rest.
    """
    return dataclasses.field(default=default, metadata={"help": note, **bounds})


def required(note: str, **kwargs: Any) -> Any:
    """A field without a default, with its line of ``--help``."""
    return dataclasses.field(metadata={"help": note}, **kwargs)


def field_metadata(config_class: type) -> dict[str, dict[str, Any]]:
    """What :func:`option` says of each field that it made, in ``config_class`` or a class that this one extends."""
    found: dict[str, dict[str, Any]] = {}
    for base in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        for field in dataclasses.fields(base):
            found[field.name] = {**found.get(field.name, {}), **field.metadata}
    return found


@dataclass(frozen=True)
class TrainConfig:
    """Base of a task's configuration, which adds ``data`` and the sizes of the model."""

    # The YAML with a section per scale.
    scales_file: ClassVar[Path]

    method: MethodName = required("a row of Table 1")
    run_dir: str = required("the folder the run lives in")
    scale: str = option("auto", "paper, cpu (two cores, minutes), smoke (seconds); auto: paper with CUDA, else cpu")
    scale_reason: str = ""
    seed: int = option(1, "of weights, routers, data order, masks, dropout", at_least=0, at_most=_LARGEST_SEED)
    resume: bool = option(False, "continue the run in run_dir from its newest good checkpoint, if there is one")
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "auto: bf16 where the device is fast at it")

    num_layers: int = option(4, "transformer layers", at_least=1)
    d_model: int = option(256, "model width", at_least=1)
    num_heads: int = option(8, "attention heads", at_least=1)
    d_hidden: int = option(8192, "width of the MLP, all experts together", at_least=1)
    dropout: float = option(0.1, "after attention and MLP, on embeddings, and inside a dense MLP", at_least=0, below=1)
    attention_dropout: float = option(0.0, "on attention weights", at_least=0, below=1)

    num_experts: int = option(16, "N, the experts an MLP is cut into", at_least=1)
    layers: LayerNames | tuple[int, ...] = option("all", "which have experts: names of halves, or indices from 0")
    k_min: int | None = option(None, "activated experts at the start; null: the method's own")
    k_max: int | None = option(None, "activated experts at the end; null: the method's own")
    schedule: Mode | None = option(None, "how k moves from k_min to k_max; null: the method's own")
    router: RouterKind | None = option(None, "where tokens go; null: the method's own")
    score: Score = option("softmax_after_topk", "how router logits become weights")
    output_scale: float | Literal["k", "num_experts"] = option(1, "a multiplier on an SMoE layer's output")
    balance_weight: float | None = option(None, "of the load-balancing loss; null: the method's own", at_least=0)
    consistency_weight: float | None = option(None, "of THOR's consistency loss; null: the method's own", at_least=0)

    steps: int = option(400_000, "optimizer steps", at_least=1)
    batch_size: int = option(22, "sequences per step, over all processes", at_least=1)
    learning_rate: float = option(2.5e-4, "the largest one", above=0)
    decay: Decay = option("cosine", "how the learning rate falls to 0")
    warmup_steps: int = option(0, "steps in which the learning rate rises to its full value", at_least=0)
    weight_decay: float = option(0.0, "of AdamW; 0 is Adam", at_least=0)
    clip: float = option(0.25, "largest norm of the gradient", above=0)

    eval_interval: int = option(4000, "steps between evaluations on valid; each writes a checkpoint", at_least=1)
    eval_batch_size: int = option(10, "sequences in an evaluation pass", at_least=1)
    save_interval: int | None = option(None, "steps between checkpoints; null: eval_interval", at_least=1)
    log_interval: int = option(200, "steps between lines in metrics.jsonl", at_least=1)
    sweep: tuple[int, ...] = option((1, 2, 4, 8, 12, 16), "the k of the final sweep, up to num_experts")
    progress: bool = option(True, "show a progress bar")

    engine: Engine = option("auto", "what computes the experts: torch, fastmoe (needs fmoe and CUDA), or auto")
    expert_parallel: int = option(1, "processes that share the experts of a layer; 1: each has all of them", at_least=1)
    fsdp: bool = option(False, "shard parameters, gradients and optimizer state over the processes")
    process_timeout: float = option(600.0, "seconds that a process waits for another before it gives up", above=0)

    def __post_init__(self) -> None:
        """ValueError in one line for a field that can't be used. Subclasses check their own fields, then call this."""
        method = get_method(self.method)
        for name, known in field_metadata(type(self)).items():
            value = getattr(self, name)
            for words in known if value is not None else ():
                if words in _BOUNDS and not _BOUNDS[words](value, known[words]):
                    raise ValueError(f"{name} is {value}; it must be {words.replace('_', ' ')} {known[words]}")
        if not self.sweep or not 1 <= min(self.sweep) <= self.num_experts:
            allowed = f"each at least 1 and one at most num_experts = {self.num_experts}"
            raise ValueError(f"sweep is {list(self.sweep)}; it must list numbers, {allowed}")
        check_output_scale(self.output_scale)
        if method.routed:
            self._check_routed()
            return
        for name in _ONLY_EXPERTS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}, but {self.method} has no experts; leave {name} out")
        if method.dropout == "concrete" and self.dropout == 0:
            raise ValueError(f"dropout is 0.0; {self.method} learns its rate and must start above 0")

    def _check_routed(self) -> None:
        check_divisible(self.d_hidden, self.num_experts)
        chosen_layers(self.layers, self.num_layers)
        if self.num_experts % self.expert_parallel:
            allowed = f"a divisor of num_experts = {self.num_experts}"
            raise ValueError(f"expert_parallel is {self.expert_parallel}; it must be {allowed}")
        k_min, k_max, _ = self.k_schedule()
        if not 1 <= k_min <= k_max <= self.num_experts:
            allowed = f"1 <= k_min <= k_max <= num_experts = {self.num_experts}"
            raise ValueError(f"k_max is {k_max}, k_min is {k_min}; it must be {allowed}")

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that follow from others a user gave, such as the sizes of the run that a fine-tuning starts from."""
        return {}

    def for_evaluation(self) -> TrainConfig:
        """As a finished run is measured: by one process, whatever trained it."""
        return dataclasses.replace(self, engine="auto", expert_parallel=1, fsdp=False)

    def resolved(self) -> TrainConfig:
        """With precision and engine as what they come to on this machine; ValueError if fmoe can't run here."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        engine = resolve_engine(self.engine) if self.get_method().routed else self.engine
        return dataclasses.replace(self, precision=resolve_precision(self.precision, device), engine=engine)

    def get_method(self) -> Method:
        """The method's builder, losses and defaults."""
        return METHODS[self.method]

    def k_schedule(self) -> tuple[int, int, str]:
        """(k_min, k_max, mode); what is not given comes from the method."""
        method = self.get_method()
        k_max = method.k_max(self.num_experts) if self.k_max is None else self.k_max
        k_min = min(method.k_min(self.num_experts), k_max) if self.k_min is None else self.k_min
        return k_min, k_max, method.schedule if self.schedule is None else self.schedule

    def smoe_layers(self) -> list[int]:
        """The indices of the layers that have experts; none for a dense method."""
        return chosen_layers(self.layers, self.num_layers) if self.get_method().routed else []

    def ks_at(self, step: int) -> list[int]:
        """Activated experts of every SMoE layer at a training step; empty for a dense method."""
        k_min, k_max, mode = self.k_schedule()
        return ks_at(step, self.steps, [(k_min, k_max)] * len(self.smoe_layers()), mode, seed=self.seed)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a training step."""
        return learning_rate_at(step, self.steps, self.learning_rate, self.warmup_steps, self.decay)

    def eval_k(self) -> int | None:
        """The k that the best checkpoint is chosen by: the largest one training visits. None for a dense method."""
        return self.k_schedule()[1] if self.get_method().routed else None

    def sweep_ks(self) -> list[int | None]:
        """The k of the final sweep; [None] for a dense method."""
        if not self.get_method().routed:
            return [None]
        return sorted({k for k in self.sweep if k <= self.num_experts})

    def make_mlp(self, layer: int, **options: Any) -> nn.Module:
        """A fresh MLP for transformer layer ``layer``; ``options`` (activation, vocab_size) go to its maker.

        Weights come from PyTorch's global generator, fixed routers from ``seed`` and ``layer`` alone. In a layer that
        ``layers`` leaves out it is the dense MLP with dropout.
        """
        sizes = {"d_model": self.d_model, "d_hidden": self.d_hidden, "dropout": self.dropout}
        if layer not in self.smoe_layers():
            method = METHODS["dense_dropout"] if self.get_method().routed else self.get_method()
            options.pop("vocab_size", None)
            return method.make_mlp(**sizes, **options)
        options |= {name: getattr(self, name) for name in ("num_experts", "score", "output_scale", "router", "engine")}
        options |= {"top_k": self.k_schedule()[0], "seed": 1000 * self.seed + layer}
        return self.get_method().make_mlp(**sizes, **options)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain data (numbers, text, lists), ready for YAML and JSON."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
