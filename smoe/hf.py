"""Hugging Face: k during ``transformers.Trainer``, saving and loading."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .control import set_top_k, smoe_layers
from .modulize.hook import record_when_saving
from .modulize.load import from_pretrained
from .modulize.save import save_pretrained
from .schedule import MODES, ks_at

__all__ = ["TopKCallback", "from_pretrained", "save_pretrained"]

record_when_saving()


class TopKCallback(TrainerCallback):
    """Lets k grow while a ``Trainer`` trains: before every step the SMoE layers get ``ks_at(step, max_steps, ...)``.

    k follows from the trainer's step alone, so a run resumed with ``resume_from_checkpoint`` goes on with the k it
    would have had. While the trainer evaluates, k is that of the last step.

    Args:
        k_min, k_max: None means N / 2 and N, the paper's.
        mode, seed: of :func:`smoe.ks_at`.
    """

    def __init__(
        self, k_min: int | None = None, k_max: int | None = None, mode: str = "linear", *, seed: int = 0
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        self.k_min, self.k_max, self.mode, self.seed = k_min, k_max, mode, seed

    def set_top_k(self, model: Any, step: int, total_steps: int) -> None:
        """Sets the k of every layer of ``model`` for this step."""
        layers = smoe_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no SMoE layer; TopKCallback needs smoe.modulize(model) first")
        ranges = []
        for _, layer in layers:
            k_max = layer.num_experts if self.k_max is None else self.k_max
            ranges.append((min(max(layer.num_experts // 2, 1), k_max) if self.k_min is None else self.k_min, k_max))
        set_top_k(model, ks_at(step, total_steps, ranges, self.mode, seed=self.seed))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)
