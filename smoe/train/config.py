"""What every training can be told: one frozen dataclass, to which each task adds its own fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from smoe.engine import resolve_engine
from smoe.method_config import MethodConfig
from smoe.options import option, required
from smoe.schedule import k_at
from smoe.train.auto import resolve_precision
from smoe.train.learning_rate import Decay


@dataclass(frozen=True)
class TrainConfig(MethodConfig):
    """Base of a task's configuration, which adds ``data`` and what the model needs besides."""

    # The YAML with a section per scale.
    scales_file: ClassVar[Path]

    run_dir: str = required("the folder the run lives in")
    _: KW_ONLY
    scale: str = option("auto", "a section of the task's YAML: paper, cpu, smoke, ...; auto: paper with CUDA, else cpu")
    scale_reason: str = ""
    resume: bool = option(False, "continue the run in run_dir from its newest good checkpoint, if there is one")
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "auto: bf16 where the device is fast at it")

    num_heads: int = option(8, "attention heads", at_least=1)
    residual_dropout: float | None = option(
        None, "after attention and MLP, and on embeddings; null: dropout", at_least=0, below=1
    )
    attention_dropout: float = option(0.0, "on attention weights", at_least=0, below=1)

    batch_size: int = option(22, "sequences per step, over all processes", at_least=1)
    learning_rate: float = option(2.5e-4, "the largest one", above=0)
    decay: Decay = option("cosine", "how the learning rate falls to 0")
    warmup_steps: int = option(0, "steps in which the learning rate rises to its full value", at_least=0)
    beta2: float = option(0.999, "of Adam: how slowly its mean of squared gradients moves", at_least=0, below=1)
    weight_decay: float = option(0.0, "of AdamW; 0 is Adam", at_least=0)
    clip: float = option(0.25, "largest norm of the gradient", above=0)

    skip_nonfinite: int = option(
        0, "how many steps in all may be left out for a loss or gradient that is not finite; the next stops", at_least=0
    )

    eval_interval: int = option(4000, "steps between evaluations on valid; each writes a checkpoint", at_least=1)
    patience: int | None = option(
        None, "stop when so many evaluations in a row bring no new best on valid; null: after steps", at_least=1
    )
    eval_batch_size: int = option(10, "sequences in an evaluation pass", at_least=1)
    save_interval: int | None = option(None, "steps between checkpoints; null: eval_interval", at_least=1)
    log_interval: int = option(200, "steps between lines in metrics.jsonl", at_least=1)
    sweep: tuple[int, ...] = option(
        (1, 2, 4, 8, 12, 16), "the k of the final sweep, up to num_experts; the default ends with num_experts"
    )
    progress: bool = option(True, "show a progress bar")

    fsdp: bool = option(False, "shard parameters, gradients and optimizer state over the processes")
    process_timeout: float = option(600.0, "seconds that a process waits for another before it gives up", above=0)

    def __post_init__(self) -> None:
        """ValueError in one line for a field that can't be used. Subclasses check their own fields, then call this."""
        super().__post_init__()
        if not self.sweep or not 1 <= min(self.sweep) <= self.num_experts:
            allowed = f"each at least 1 and one at most num_experts = {self.num_experts}"
            raise ValueError(f"sweep is {list(self.sweep)}; it must list numbers, {allowed}")

    def residual_rate(self) -> float:
        """The rate of every dropout outside MLPs and attention weights."""
        return self.dropout if self.residual_dropout is None else self.residual_dropout

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that follow from others a user gave, such as the sizes of the run that a fine-tuning starts from."""
        return {}

    def resolved(self) -> TrainConfig:
        """With precision and engine as what they come to on this machine; ValueError if fmoe can't run here."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        engine = resolve_engine(self.engine) if self.get_method().routed else self.engine
        return dataclasses.replace(self, precision=resolve_precision(self.precision, device), engine=engine)

    def eval_ks(self) -> list[int | None]:
        """The k that best checkpoints are chosen at: where training ends, then N if that differs; [None] if dense."""
        if not self.get_method().routed:
            return [None]
        k_min, k_max, mode = self.k_schedule()
        last = k_max if mode.startswith("random") else k_at(self.steps, self.steps, k_min, k_max, mode)
        return list(dict.fromkeys((last, self.num_experts)))

    def sweep_ks(self) -> list[int | None]:
        """The k of the final sweep; [None] for a dense method."""
        if not self.get_method().routed:
            return [None]
        ks = {k for k in self.sweep if k <= self.num_experts}
        return sorted(
            ks | ({self.num_experts} if self.sweep == type(self).sweep else set())
        )  # N, unless told otherwise


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain data (numbers, text, lists), ready for YAML and JSON."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
