"""What all routers share: their result, k, the score rule, and who is told of a pass."""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..uncompiled import uncompiled
from .per_token import first_choices
from .routing import Routing

Score = Literal["softmax_after_topk", "softmax_before_topk", "sum"]
SCORES: tuple[str, ...] = get_args(Score)


class Watcher(Protocol):
    """Is told of every pass: a list of routings, or what counts them instead of keeping them."""

    def append(self, routing: Routing, /) -> None: ...


def check_top_k(top_k: int, num_experts: int) -> int:
    """top_k itself if it is a whole number in 1..num_experts, else a ValueError."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number from 1 to num_experts = {num_experts}")
    return top_k


class Router(nn.Module):
    """What all routers share: the number of experts, k, and the rule that turns logits into weights.

    Args:
        num_experts: N.
        top_k: k, the experts chosen per token. It may change between passes.
        score: ``softmax_after_topk``: softmax over the k chosen logits (the released code; weights sum to 1);
            ``softmax_before_topk``: softmax over all N, of which the k largest are kept (the paper's Eq. 1);
            ``sum``: every weight is 1, so at k = N the layer computes the dense MLP that the experts were cut from.
    """

    needs_token_ids = False

    def __init__(self, num_experts: int, top_k: int, score: Score = "softmax_after_topk") -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score is {score!r}; it must be one of {', '.join(SCORES)}")
        self._watchers: list[Watcher] = []
        self.num_experts = num_experts
        self.score = score
        self.top_k = top_k

    @property
    def top_k(self) -> int:
        """k: the number of experts that each token activates."""
        return self._top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self._top_k = check_top_k(value, self.num_experts)

    def __call__(self, *args: Any, **kwargs: Any) -> Routing:
        routing = super().__call__(*args, **kwargs)
        if self._watchers:
            self._tell(routing)
        return routing

    def watch(self, watcher: Watcher) -> None:
        """From now on every pass appends its Routing to ``watcher``, a list (see ``smoe.record_routing``) or alike.

        Not a forward hook: a model that was compiled without the hook would never call it.
        """
        self._watchers.append(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Ends :meth:`watch` for it."""
        self._watchers = [other for other in self._watchers if other is not watcher]

    @uncompiled
    def _tell(self, routing: Routing) -> None:
        for watcher in self._watchers:
            watcher.append(routing)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, score={self.score}"

    def _all_experts(self, x: Tensor) -> Tensor:
        return torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)

    def _routing(self, logits: Tensor | None, indices: Tensor, k_per_token: Tensor | None) -> Routing:
        """The routing to the chosen experts.

        Args:
            logits: (T, N) float32; None: all are equal.
            indices: (T, k), the first choice first where ``k_per_token`` is given.
            k_per_token: (T,), how many of its choices each token keeps; None: all.
        """
        if logits is None:
            logits = torch.zeros(indices.shape[0], self.num_experts, dtype=torch.float32, device=indices.device)
        routing = Routing(indices, self._weights(logits, indices), None)
        return routing if k_per_token is None else first_choices(routing, k_per_token, self.score)

    def _weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        """(T, N) float32 logits and (T, k) indices -> (T, k) float32 weights, by the score rule."""
        if self.score == "sum":
            return torch.ones(indices.shape, dtype=torch.float32, device=indices.device)
        if self.score == "softmax_before_topk":
            return torch.softmax(logits, dim=-1).gather(1, indices)
        return torch.softmax(logits.gather(1, indices), dim=-1)


def generator(seed: int | None) -> torch.Generator | None:
    """One of its own for a seed; None is PyTorch's global one."""
    return None if seed is None else torch.Generator().manual_seed(seed)
