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
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .uncompiled import uncompiled

Score = Literal["softmax_after_topk", "softmax_before_topk", "sum"]
SCORES: tuple[str, ...] = get_args(Score)
RouterKind = Literal["random", "learned", "uniform", "hash"]
ROUTERS: tuple[str, ...] = get_args(RouterKind)


class Routing(NamedTuple):
    """What a router chose for T tokens.

    indices: (T, k) int64, the chosen experts of each token, all different.
    weights: (T, k) float32, the factor of each chosen expert's output.
    balance_loss: scalar, Switch's load-balancing loss (learned router), else None.
    """

    indices: Tensor
    weights: Tensor
    balance_loss: Tensor | None
    absent = False  # whether slots may be empty: only in a PartialRouting


class PartialRouting(Routing):
    """A routing with empty slots: an index of -1 is no expert, and the weight there gets gradient 0.

    No router leaves any. Where experts are spread over ranks, a token's choice has gaps on each of them.
    """

    __slots__ = ()
    absent = True


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
        self._watchers: list[list[Routing]] = []
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

    def watch(self, routings: list[Routing]) -> None:
        """From now on every pass appends its Routing to ``routings`` (see ``smoe.record_routing``).

        Not a forward hook: a model that was compiled without the hook would never call it.
        """
        self._watchers.append(routings)

    def unwatch(self, routings: list[Routing]) -> None:
        """Ends :meth:`watch` for this list."""
        self._watchers = [watcher for watcher in self._watchers if watcher is not routings]

    @uncompiled
    def _tell(self, routing: Routing) -> None:
        for watcher in self._watchers:
            watcher.append(routing)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, score={self.score}"

    def _all_experts(self, x: Tensor) -> Tensor:
        return torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)

    def _weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        """(T, N) float32 logits and (T, k) indices -> (T, k) float32 weights, by the score rule."""
        if self.score == "sum":
            return torch.ones(indices.shape, dtype=torch.float32, device=indices.device)
        if self.score == "softmax_before_topk":
            return torch.softmax(logits, dim=-1).gather(1, indices)
        return torch.softmax(logits.gather(1, indices), dim=-1)

    def _equal_weights(self, indices: Tensor) -> Tensor:
        """The weights of a router without logits: those of equal logits."""
        logits = torch.zeros(indices.shape[0], self.num_experts, dtype=torch.float32, device=indices.device)
        return self._weights(logits, indices)


class _LinearRouter(Router):
    """Logits ``x @ weight.T + bias`` in float32, then the k largest; ``weight (N, d)`` and ``bias (N,)``.

    Args:
        d_model: d.
        init_std: standard deviation of the weights (0.02 in the released code). The bias starts at 0.
        seed: of the weights; None draws from PyTorch's global generator.
    """

    weight: Tensor
    bias: Tensor
    trained: bool

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        score: Score = "softmax_after_topk",
        *,
        init_std: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, score)
        dtype = None if self.trained else torch.float32  # fixed numbers don't follow torch.set_default_dtype
        for name, shape in (("weight", (num_experts, d_model)), ("bias", (num_experts,))):
            tensor = torch.empty(shape, dtype=dtype)
            if self.trained:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.seed = seed
        self.reset_parameters(init_std)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws the weights N(0, std) and sets the bias to 0."""
        # Drawn in float32 on the CPU whatever the device and dtype, so that a seed gives the same router everywhere.
        draw = torch.randn(self.weight.shape, generator=_generator(self.seed), dtype=torch.float32, device="cpu")
        self.weight.copy_(draw * std)
        self.bias.zero_()

    def logits(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, N), always in float32: rounded logits would change which experts are chosen."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
            if x.dtype == torch.float32 or transformed:  # the transforms of torch.func need plain autograd
                return F.linear(x.float(), weight, bias)
            return _Logits.apply(x, weight, bias)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        logits = self.logits(x)
        if self.top_k == self.num_experts:
            indices = self._all_experts(x)
        else:
            indices = logits.topk(self.top_k, dim=-1).indices
        return self._routing(logits, indices)

    def _routing(self, logits: Tensor, indices: Tensor) -> Routing:
        return Routing(indices, self._weights(logits, indices), None)


class _Logits(torch.autograd.Function):
    """``F.linear(x.float(), weight, bias)`` that computes the gradient of x in the dtype of x, which it has anyway.

    Neither a float32 copy of x nor a float32 gradient of its size is kept (3 % of a training step of RoBERTa's layer).
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
    """SMoE-Dropout's router: a linear layer, randomly initialised, then fixed.

    Weight and bias are buffers, not parameters: saved and loaded with the model, never in an optimizer, never decayed.
    They stay the same float32 numbers whatever is done to the model: casts, ``torch.set_default_dtype``, the meta
    device and ``to_empty``. A checkpoint that holds them rounded to another dtype loads as what they were before.
    Gradients still reach ``x`` through the weights of the chosen experts. The bias is 0 unless a checkpoint says
    otherwise (the released code has one).
    """

    trained = False

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        self._kept: dict[str, Tensor] = {}  # on the CPU, while the buffers are on the meta device
        on_meta = self.weight.is_meta
        if on_meta:
            super().to_empty(device="cpu")
        super().reset_parameters(std)
        if on_meta:
            self.to("meta")

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomRouter:
        # .to(), .half(), .cuda(), .to_empty() and the like come through here: take the device from them alone.
        before = {name: (getattr(self, name), self._values(name)) for name in ("weight", "bias")}
        super()._apply(fn, recurse)
        for name, (old, values) in before.items():
            new = getattr(self, name)
            if new.dtype != torch.float32:
                new = torch.empty(new.shape, dtype=torch.float32, device=new.device)
            if new.is_meta and values is not None:
                self._kept[name] = values.to("cpu", copy=True)
            elif new is not old and values is not None:
                new.copy_(values)
            setattr(self, name, new)
        return self

    def _values(self, name: str) -> Tensor | None:
        """The numbers of a buffer, also while it is on the meta device, if they are known."""
        buffer = getattr(self, name)
        return self._kept.get(name) if buffer.is_meta else buffer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight", "bias"):
            loaded, own = state_dict.get(prefix + name), self._values(name)
            if isinstance(loaded, Tensor) and loaded.dtype != torch.float32:
                own = None if own is None or own.shape != loaded.shape else own.to(loaded.device)
                only_rounded = own is not None and torch.equal(own.to(loaded.dtype), loaded)
                state_dict[prefix + name] = own.clone() if only_rounded else loaded.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LearnedRouter(_LinearRouter):
    """The learnable SMoE baseline: the same linear layer, trained.

    Its ``balance_loss`` is Switch's (Fedus et al. 2021, Eq. 4): N * sum_i f_i * P_i, where f_i is the fraction of the
    (token, slot) pairs that went to expert i and P_i the mean over tokens of its softmax probability. It is 1 when
    balanced.
    """

    trained = True

    def _routing(self, logits: Tensor, indices: Tensor) -> Routing:
        if logits.shape[0] == 0:
            balance_loss = logits.sum()
        else:
            chosen = torch.zeros_like(logits).scatter_(1, indices, 1.0)
            fraction = chosen.mean(0) / self.top_k
            balance_loss = self.num_experts * (fraction * torch.softmax(logits, dim=-1).mean(0)).sum()
        weights = self._weights(logits, indices)
        if self.score == "sum":
            # Weights of 1 leave the router out of the graph, and DDP fails on a parameter without a gradient.
            weights = weights + 0.0 * logits.gather(1, indices)
        return Routing(indices, weights, balance_loss)


class UniformRouter(Router):
    """THOR's routing: k different experts, drawn uniformly for each token and each pass, also in evaluation.

    Draws from PyTorch's global generator of the device, so ``torch.manual_seed`` makes a run reproducible.
    """

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        if self.top_k == self.num_experts:
            indices = self._all_experts(x)
        else:
            draw = torch.rand(x.shape[0], self.num_experts, dtype=torch.float32, device=x.device)
            indices = draw.topk(self.top_k, dim=-1).indices
        return Routing(indices, self._equal_weights(indices), None)


class HashRouter(Router):
    """A fixed random table from *token id* to experts (Roller et al. 2021).

    The table holds a random order of all N experts per token id, of which the first k are used: the choice at k is part
    of the choice at k + 1. (The paper's release hashes the position in the batch instead.)

    Args:
        vocab_size: V, the number of token ids.
        seed: of the table ``(V, N)``; None draws from PyTorch's global generator.
    """

    needs_token_ids = True

    def __init__(
        self,
        vocab_size: int,
        num_experts: int,
        top_k: int,
        score: Score = "softmax_after_topk",
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, score)
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size!r}; a hash router needs the number of token ids (at least 1)")
        draw = torch.rand(vocab_size, num_experts, generator=_generator(seed), dtype=torch.float32, device="cpu")
        self.register_buffer("table", torch.empty(draw.shape, dtype=torch.int32).copy_(draw.argsort(dim=-1)))

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        if token_ids is None:
            raise ValueError("token_ids is missing; a hash router needs the id of every token: layer(x, token_ids=ids)")
        ids = token_ids.reshape(-1)
        if ids.shape[0] != x.shape[0]:
            raise ValueError(f"token_ids has {ids.shape[0]} ids; it must have one for each of the {x.shape[0]} tokens")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"token_ids is {ids.dtype}; a hash router needs whole numbers")
        try:
            # index_select refuses negative ids; [...] would count them from the end of the table.
            indices = self.table[:, : self.top_k].index_select(0, ids.long()).long()
        except IndexError:  # on a CPU; a CUDA device asserts by itself
            raise ValueError(
                f"token_ids has ids from {int(ids.min())} to {int(ids.max())}; they must be from 0 to "
                f"vocab_size - 1 = {self.table.shape[0] - 1}"
            ) from None
        return Routing(indices, self._equal_weights(indices), None)


def _generator(seed: int | None) -> torch.Generator | None:
    """One of its own for a seed; None is PyTorch's global one."""
    return None if seed is None else torch.Generator().manual_seed(seed)


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
    if kind in ("random", "learned"):
        router = RandomRouter if kind == "random" else LearnedRouter
        return router(d_model, num_experts, top_k, score, seed=seed)
    if kind == "uniform":
        return UniformRouter(num_experts, top_k, score)
    if kind == "hash":
        return HashRouter(vocab_size, num_experts, top_k, score, seed=seed)
    raise ValueError(f"router is {kind!r}; it must be one of {', '.join(ROUTERS)}")
