"""Hugging Face: k during ``transformers.Trainer``, saving and loading.

After ``import smoe.hf`` Transformers' own ``from_pretrained`` loads modulized models (``AutoModel...``, pipelines, and
whatever else calls it). Without it, and before version 5 of Transformers, they are refused there.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, __version__

from .control import set_top_k, smoe_layers
from .modulize.hook import record_when_saving
from .modulize.load import from_pretrained
from .modulize.save import save_pretrained
from .schedule import MODES, ks_at

__all__ = ["TopKCallback", "from_pretrained", "save_pretrained"]

record_when_saving()
if int(__version__.partition(".")[0]) >= 5:  # earlier versions would round the routers to the dtype of the model
    from .modulize import auto  # noqa: F401 (registers with Transformers)


class TopKCallback(TrainerCallback):
    """Lets k grow while a ``Trainer`` trains: before every step the SMoE layers get ``ks_at(step, max_steps, ...)``.

    k follows from the trainer's step alone, so a run resumed with ``resume_from_checkpoint`` goes on with the k it
    would have had. During evaluation k is that of the last step. A checkpoint has the k of the last step before it.

    Args:
        k_min, k_max: None means N / 2 and N of each layer, the paper's.
        mode, seed: of :func:`smoe.ks_at`.

    Raises:
        ValueError: when training begins, if the model has no SMoE layer, or if k_min or k_max is not in 1..N of every
            layer.
    """

    def __init__(
        self, k_min: int | None = None, k_max: int | None = None, mode: str = "linear", *, seed: int = 0
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        for name, value in (("k_min", k_min), ("k_max", k_max)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1, or None")
        if k_min is not None and k_max is not None and k_min > k_max:
            raise ValueError(f"k_min is {k_min} and k_max is {k_max}; k_min must be at most k_max")
        self.k_min, self.k_max, self.mode, self.seed = k_min, k_max, mode, seed

    def set_top_k(self, model: Any, step: int, total_steps: int) -> None:
        """Sets the k of every layer of ``model`` for this step."""
        ranges = [self._range(name, layer.num_experts) for name, layer in smoe_layers(model)]
        if not ranges:
            raise ValueError(f"{type(model).__name__} has no SMoE layer; TopKCallback needs smoe.modulize(model) first")
        set_top_k(model, ks_at(step, total_steps, ranges, self.mode, seed=self.seed))

    def _range(self, name: str, num_experts: int) -> tuple[int, int]:
        """(k_min, k_max) of one layer, which has experts for all of it."""
        for field, value in (("k_min", self.k_min), ("k_max", self.k_max)):
            if value is not None and value > num_experts:
                raise ValueError(f"{field} is {value}; it must be at most {num_experts}, the experts of {name}")
        k_max = num_experts if self.k_max is None else self.k_max
        return min(max(num_experts // 2, 1), k_max) if self.k_min is None else self.k_min, k_max

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)
