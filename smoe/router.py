"""Where a token goes: the routers.

A router maps token vectors ``x (T, d)`` to a :class:`Routing`: for each of T tokens the k chosen experts and their
weights. It never touches expert weights. Four kinds, one interface:

=========  ============================================================================================
random     a linear layer, randomly initialised and *fixed* (SMoE-Dropout, section 3.2)
learned    the same layer, trained, with Switch's load-balancing loss (the learnable SMoE baseline)
uniform    k experts drawn uniformly at random for each token and each pass (THOR, Zuo et al. 2022)
hash       a fixed random table from token id to experts (Hash Layers, Roller et al. 2021)
=========  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .uncompiled import uncompiled

Score = Literal["softmax_after_topk", "softmax_before_topk", "sum"]
RouterKind = Literal["random", "learned", "uniform", "hash"]
SCORES: tuple[str, ...] = get_args(Score)
ROUTERS: tuple[str, ...] = get_args(RouterKind)


class Routing(NamedTuple):
    """The choice of a router for T tokens.

    indices: (T, k) int64, the chosen experts of each token, all different.
    weights: (T, k) float32, what each chosen expert's output is multiplied with.
    balance_loss: scalar, Switch's load-balancing loss (learned router), else None.
    """

    indices: Tensor
    weights: Tensor
    balance_loss: Tensor | None
    absent = False  # whether there may be empty slots; only a PartialRouting has them


class PartialRouting(Routing):
    """A routing with empty slots: where an index is -1 there is no expert; the weight there gets gradient 0.

    No router leaves any; where experts are spread over ranks, a token's choice has gaps on each of them.
    """

    __slots__ = ()
    absent = True


def check_top_k(top_k: int, num_experts: int) -> int:
    """top_k itself if it is a whole number in 1..num_experts, else a ValueError that says so."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number from 1 to num_experts = {num_experts}")
    return top_k


class Router(nn.Module):
    """What all routers share: the number of experts, k, and how scores turn into weights.

    Args:
        num_experts: N.
        top_k: k, the experts chosen for a token; read anew at every pass, so it may change between steps.
        score: ``softmax_after_topk``: softmax over the k chosen logits (the released code; weights sum to 1);
            ``softmax_before_topk``: softmax over all N, then the k largest as they are (the paper's Eq. 1);
            ``sum``: every weight is 1, so that k = N sums all experts, as the dense MLP they were cut from does.
    """

    needs_token_ids = False

    def __init__(self, num_experts: int, top_k: int, score: str = "softmax_after_topk") -> None:
        super().__init__()
        self._watchers: list[list[Routing]] = []
        if score not in SCORES:
            raise ValueError(f"score is {score!r}; it must be one of {', '.join(SCORES)}")
        self.num_experts = num_experts
        self.score = score
        self.top_k = top_k

    @property
    def top_k(self) -> int:
        """k: the number of experts each token activates."""
        return self._top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self._top_k = check_top_k(value, self.num_experts)

    def __call__(self, *args: Any, **kwargs: Any) -> Routing:
        routing = super().__call__(*args, **kwargs)
        if self._watchers:
            self._tell(routing)
        return routing

    def watch(self, routings: list[Routing]) -> None:
        """From now on every pass appends its Routing to ``routings`` (see ``smoe.record_routing``).

        No forward hook: a model that torch.compile has seen without the hook would never call it.
        """
        self._watchers.append(routings)

    def unwatch(self, routings: list[Routing]) -> None:
        """Ends :meth:`watch` for this very list."""
        self._watchers = [watcher for watcher in self._watchers if watcher is not routings]

    @uncompiled
    def _tell(self, routing: Routing) -> None:
        for watcher in self._watchers:
            watcher.append(routing)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, score={self.score}"

    def _all_experts(self, num_tokens: int, device: torch.device) -> Tensor:
        return torch.arange(self.num_experts, device=device).expand(num_tokens, -1)

    def _weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        """(T, N) float32 logits and (T, k) indices -> (T, k) float32 weights, by the score rule."""
        if self.score == "sum":
            return torch.ones(indices.shape, dtype=torch.float32, device=indices.device)
        if self.score == "softmax_before_topk":
            return torch.softmax(logits, dim=-1).gather(1, indices)
        return torch.softmax(logits.gather(1, indices), dim=-1)

    def _constant_weights(self, indices: Tensor) -> Tensor:
        """The weights of a router without logits: the same rules with all logits equal."""
        value = {"softmax_after_topk": 1 / self.top_k, "softmax_before_topk": 1 / self.num_experts, "sum": 1.0}
        return torch.full(indices.shape, value[self.score], dtype=torch.float32, device=indices.device)


class _LinearRouter(Router):
    """Logits ``x @ weight.T + bias`` in float32, then the k largest; ``weight (N, d)`` and ``bias (N,)``."""

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, N), always in float32: a rounding of the logits would change which experts are chosen."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
            if x.dtype == torch.float32 or transformed:  # torch.func's transforms want plain autograd
                return F.linear(x.float(), weight, bias)
            return _Logits.apply(x, weight, bias)

    def _choose(self, logits: Tensor) -> Tensor:
        if self.top_k == self.num_experts:
            return self._all_experts(logits.shape[0], logits.device)
        return logits.topk(self.top_k, dim=-1).indices

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        logits = self.logits(x)
        indices = self._choose(logits)
        return Routing(indices, self._weights(logits, indices), None)

    def _draw(self, d_model: int, init_std: float, seed: int | None) -> Tensor:
        # Drawn on the CPU whatever the device, so that one seed gives one router everywhere.
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.randn(self.num_experts, d_model, generator=generator, device="cpu") * init_std


class _Logits(torch.autograd.Function):
    """``F.linear(x.float(), weight, bias)`` whose gradient for x is computed in x's own dtype, which it has anyway.

    Neither the float32 copy of x nor a float32 gradient of its size is kept or filled (3 % of a training step of
    RoBERTa's layer).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype = x.dtype
        return F.linear(x.float(), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad.to(ctx.dtype) @ weight.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ x.float() if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


class RandomRouter(_LinearRouter):
    """SMoE-Dropout's router: randomly initialised, then fixed for good.

    Weight and bias are buffers, not parameters: saved and restored with the model, never in an optimizer, never
    decayed, and float32 for good: ``model.bfloat16()`` does not round them into another router. Gradients still
    reach ``x`` through the weights of the chosen experts. The bias is zero unless it is loaded from a checkpoint (the
    released code has one).

    Args:
        d_model: d. init_std: standard deviation of the weights (0.02, as released). seed: fixes the draw.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        score: str = "softmax_after_topk",
        *,
        init_std: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, score)
        self.register_buffer("weight", torch.empty(num_experts, d_model))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.seed = seed
        self.reset_parameters(init_std)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws the fixed weights anew: N(0, std), bias 0."""
        with torch.no_grad():
            self.weight.copy_(self._draw(self.weight.shape[1], std, self.seed))
            self.bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomRouter:
        # What .to(), .half(), .cuda() and the like go through: take the device from them, not the dtype.
        before = {"weight": self.weight, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != torch.float32:
                setattr(self, name, old.to(new.device, torch.float32))
        return self


class LearnedRouter(_LinearRouter):
    """The learnable SMoE baseline: the same linear layer, trained.

    Its ``balance_loss`` is Switch's (Fedus et al. 2021, Eq. 4): N * sum_i f_i * P_i, where f_i is the fraction of
    the (token, choice) pairs that went to expert i and P_i the mean over tokens of its softmax probability. It is
    1 when balanced.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        score: str = "softmax_after_topk",
        *,
        init_std: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, score)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.seed = seed
        self.reset_parameters(init_std)

    reset_parameters = RandomRouter.reset_parameters

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        logits = self.logits(x)
        indices = self._choose(logits)
        if x.shape[0] == 0:
            balance_loss = logits.sum()
        else:
            chosen = torch.zeros_like(logits).scatter_(1, indices, 1.0)
            fraction = chosen.mean(0) / self.top_k
            balance_loss = self.num_experts * (fraction * torch.softmax(logits, dim=-1).mean(0)).sum()
        weights = self._weights(logits, indices)
        if self.score == "sum":
            # Weights of 1 leave the router out of the graph, and DDP stops at a parameter without a gradient.
            weights = weights + 0.0 * logits.gather(1, indices)
        return Routing(indices, weights, balance_loss)


class UniformRouter(Router):
    """THOR's routing: k different experts, drawn uniformly for each token and each pass, also when evaluating.

    Draws from PyTorch's global generator of the device, so a run is reproducible under ``torch.manual_seed``.
    """

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        num_tokens = x.shape[0]
        if self.top_k == self.num_experts:
            indices = self._all_experts(num_tokens, x.device)
        else:
            indices = torch.rand(num_tokens, self.num_experts, device=x.device).topk(self.top_k, dim=-1).indices
        return Routing(indices, self._constant_weights(indices), None)


class HashRouter(Router):
    """A fixed random table from *token id* to experts (Roller et al. 2021).

    The table holds one random order of all N experts per token id; the first k of it are used, so the choice at
    k is contained in the choice at k + 1. (The paper's release hashes the position in the batch instead.)

    Args:
        vocab_size: V. seed: fixes the table ``(V, N)``.
    """

    needs_token_ids = True

    def __init__(
        self,
        vocab_size: int,
        num_experts: int,
        top_k: int,
        score: str = "softmax_after_topk",
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, score)
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size!r}; a hash router needs the number of token ids (at least 1)")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        order = torch.rand(vocab_size, num_experts, generator=generator, device="cpu").argsort(dim=-1)
        self.register_buffer("table", torch.empty(order.shape, dtype=torch.int32).copy_(order))

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        if token_ids is None:
            raise ValueError("token_ids is missing; a hash router needs the id of every token: layer(x, token_ids=ids)")
        ids = token_ids.reshape(-1)
        if ids.shape[0] != x.shape[0]:
            raise ValueError(
                f"token_ids holds {ids.shape[0]} ids; it must hold one for each of the {x.shape[0]} tokens"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"token_ids is {ids.dtype}; a hash router needs whole numbers")
        try:
            # index_select, which takes no negative ids: [...] would count them from the table's end.
            indices = self.table[:, : self.top_k].index_select(0, ids.long()).long()
        except IndexError:  # on a CPU; a CUDA device asserts by itself
            lowest, highest = int(ids.min()), int(ids.max())
            raise ValueError(
                f"token_ids holds ids from {lowest} to {highest}; they must be 0 to vocab_size - 1 = "
                f"{self.table.shape[0] - 1}"
            ) from None
        return Routing(indices, self._constant_weights(indices), None)


def make_router(
    kind: str,
    d_model: int,
    num_experts: int,
    top_k: int,
    score: str = "softmax_after_topk",
    *,
    vocab_size: int | None = None,
    seed: int | None = None,
) -> Router:
    """The router called ``kind``: one of ``ROUTERS``. ``vocab_size`` is read by the hash router alone."""
    if kind == "random":
        return RandomRouter(d_model, num_experts, top_k, score, seed=seed)
    if kind == "learned":
        return LearnedRouter(d_model, num_experts, top_k, score, seed=seed)
    if kind == "uniform":
        return UniformRouter(num_experts, top_k, score)
    if kind == "hash":
        return HashRouter(vocab_size, num_experts, top_k, score, seed=seed)
    raise ValueError(f"router is {kind!r}; it must be one of {', '.join(ROUTERS)}")
