"""Routers: which experts a token goes to, and with which weights.

A router maps token vectors ``x (T, d)`` to a :class:`Routing`: the k chosen experts of each of T tokens and their
weights. It never touches expert weights. There are four kinds:

=========  ============================================================================================
random     a linear layer, randomly initialised and *fixed* (SMoE-Dropout, section 3.2)
learned    the same layer, trained, with Switch's load-balancing loss (the learnable SMoE baseline)
uniform    k experts drawn uniformly at random for each token and each pass (THOR, Zuo et al. 2022)
hash       a fixed random table from token id to experts (Hash Layers, Roller et al. 2021)
=========  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from .balance import balance_loss
from .base import SCORES, Router, Score, check_top_k
from .fixed import FixedBuffers
from .hash import HashRouter
from .learned import LearnedRouter
from .random import RandomRouter
from .routing import PartialRouting, Routing
from .uniform import UniformRouter

RouterKind = Literal["random", "learned", "uniform", "hash"]
ROUTERS: tuple[str, ...] = get_args(RouterKind)
CLASSES = {"random": RandomRouter, "learned": LearnedRouter, "uniform": UniformRouter, "hash": HashRouter}

__all__ = [
    "ROUTERS", "SCORES", "FixedBuffers", "HashRouter", "LearnedRouter", "PartialRouting", "RandomRouter", "Router",
    "RouterKind", "Routing", "Score", "UniformRouter", "balance_loss", "check_top_k", "make_router",
]  # fmt: skip


def make_router(
    kind: RouterKind,
    d_model: int,
    num_experts: int,
    top_k: int,
    score: Score = "softmax_after_topk",
    *,
    vocab_size: int | None = None,
    seed: int | None = None,
) -> Router:
    """The router called ``kind``; ``vocab_size`` is for the hash router only.

    Raises:
        ValueError: an argument is not valid; the message names it.
    """
    if kind not in ROUTERS:
        raise ValueError(f"router is {kind!r}; it must be one of {', '.join(ROUTERS)}")
    makers: dict[str, Callable[[], Router]] = {
        "random": lambda: RandomRouter(d_model, num_experts, top_k, score, seed=seed),
        "learned": lambda: LearnedRouter(d_model, num_experts, top_k, score, seed=seed),
        "uniform": lambda: UniformRouter(num_experts, top_k, score),
        "hash": lambda: HashRouter(vocab_size, num_experts, top_k, score, seed=seed),
    }
    return makers[kind]()
