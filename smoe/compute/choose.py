"""Which path computes the experts, and when."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..experts import Experts
from ..router import Routing
from . import dense, grouped, reference

Compute = Callable[[Tensor, Experts, Routing], Tensor]

PATHS: dict[str, Compute] = {"reference": reference.compute, "grouped": grouped.compute, "dense": dense.compute}


def choose(name: str, x: Tensor, experts: Experts, routing: Routing) -> Compute:
    """The path called ``name``, or for ``auto`` the fastest one known for this input."""
    if name == "auto":
        return PATHS["dense" if routing.indices.shape[1] == experts.num_experts else "grouped"]
    return PATHS[name]


def check_compute(name: str) -> str:
    """name itself if it is ``auto`` or one of ``PATHS``, else a ValueError that lists them."""
    if name != "auto" and name not in PATHS:
        raise ValueError(f"compute is {name!r}; it must be auto or one of {', '.join(PATHS)}")
    return name
