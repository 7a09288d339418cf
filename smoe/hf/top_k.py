"""k during ``transformers.Trainer``, and what its logs say of the experts."""

from __future__ import annotations

from typing import Any

from ..control import get_top_k, set_top_k, smoe_layers
from ..expert_load import ExpertLoad, mean_load
from ..schedule import MODES, ks_at
from .logs import LogsMore


class TopKCallback(LogsMore):
    """Lets k grow while a ``Trainer`` trains: before every step the SMoE layers get ``ks_at(step, max_steps, ...)``.

    k follows from the trainer's step alone, so a run resumed with ``resume_from_checkpoint`` goes on with the k it
    would have had. During evaluation k is that of the last step. A checkpoint has the k of the last step before it.

    ``Trainer`` logs ``k`` beside the loss, the mean over the layers where they differ.

    Args:
        k_min, k_max: None means N / 2 and N of each layer, the paper's.
        mode, seed: of :func:`smoe.ks_at`.
        expert_load: whether ``Trainer`` also logs how evenly the experts were used since the last log, over all ranks:
            ``expert_entropy``, ``busiest_expert``, ``dead_experts`` and with learned routers ``balance_loss``
            (:func:`smoe.expert_load.mean_load`). Padding counts.

    Raises:
        ValueError: when training begins, if the model has no SMoE layer, or if k_min or k_max is not in 1..N of every
            layer.
    """

    def __init__(
        self,
        k_min: int | None = None,
        k_max: int | None = None,
        mode: str = "linear",
        *,
        seed: int = 0,
        expert_load: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        for name, value in (("k_min", k_min), ("k_max", k_max)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1, or None")
        if k_min is not None and k_max is not None and k_min > k_max:
            raise ValueError(f"k_min is {k_min} and k_max is {k_max}; k_min must be at most k_max")
        self.k_min, self.k_max, self.mode, self.seed = k_min, k_max, mode, seed
        self.expert_load = expert_load
        self._model: Any = None  # while it trains
        self._load: ExpertLoad | None = None

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

    def more_logs(self, args: Any) -> dict[str, float]:
        ks = get_top_k(self._model)
        logs = {"k": ks if isinstance(ks, int) else sum(ks) / len(ks)}
        if self._load is not None:
            logs |= mean_load(self._load.read(all_ranks=args.world_size > 1))
        return logs

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)
        self._model = model
        self._stop_counting()  # an earlier training may have been cut off
        if self.expert_load:
            self._load = ExpertLoad(model).__enter__()
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.set_top_k(model, state.global_step, state.max_steps)
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._load is not None:
            self._load.__exit__()
        self._load = None
