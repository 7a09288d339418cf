"""What the configurations of both trainers share: the method, its k, and what may be asked of it."""

from __future__ import annotations

from smoe.experts import check_divisible
from smoe.layer import check_output_scale
from smoe.methods import METHODS, Method, get_method
from smoe.router import SCORES
from smoe.schedule import MODES, k_at


class MethodConfig:
    """Base of a trainer's frozen dataclass with the fields ``method``, ``d_hidden``, ``dropout``, ``num_experts``,
    ``k_min``, ``k_max``, ``schedule``, ``router``, ``score``, ``output_scale``, ``balance_weight``,
    ``consistency_weight``, ``sweep``, ``steps`` and ``seed``."""

    def check_method(self, routers: tuple[str, ...]) -> None:
        """ValueError in one line for a field of the method that can't be used; ``routers`` are those that can."""
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
        check_output_scale(self.output_scale)
        self._check_routed() if method.routed else self._check_dense(method)

    def _check_routed(self) -> None:
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
                f"sweep is {list(self.sweep)}; at least one k must be no larger than num_experts = {self.num_experts}"
            )

    def _check_dense(self, method: Method) -> None:
        """What only experts have must not be asked of a model without any: the run would be named after it."""
        for name in ("k_min", "k_max", "schedule", "router", "score", "output_scale", "balance_weight"):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {value!r}, but {self.method} has no experts; leave {name} out")
        if method.dropout == "concrete" and self.dropout == 0:
            raise ValueError(f"dropout is 0.0; {self.method} learns its rate and must start above 0")

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
