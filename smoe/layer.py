"""SMoE: router + experts + k, the drop-in replacement for a transformer's MLP."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import few_tokens
from .compute import check_compute, choose
from .engine import Engine, resolve_engine
from .experts import Experts, check_divisible
from .k_per_row import k_of_tokens
from .router import Router, RouterKind, Routing, Score, make_router
from .wrappers import unwrap

# (x (T, d), routing, function that computes the experts of this rank) -> y (T, d)
Dispatch = Callable[[Tensor, Routing, Callable[[Tensor, Routing], Tensor]], Tensor]


def check_output_scale(value: float | str) -> float | str:
    """value itself if it is a positive number, ``"k"`` or ``"num_experts"``, else a ValueError."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    if not numeric and value not in ("k", "num_experts"):
        raise ValueError(f"output_scale is {value!r}; it must be 'k', 'num_experts' or a positive number")
    return value


class SMoE(nn.Module):
    """A transformer's MLP cut into N experts, of which each token activates k.

    ``y[t] = output_scale * sum_j weights[t, j] * E_indices[t, j](x[t])`` (the paper's Eq. 1).

    Which ``score`` and ``output_scale`` to use:

    - Experts cut from a trained MLP: ``score="sum"``. Every chosen expert has weight 1, so at k = N the layer computes
      what the MLP computed.
    - Training from scratch: a softmax score, as in the paper. The weights sum to 1 (``softmax_before_topk``: to at most
      1) instead of N, so the output starts about N times smaller than that of the dense MLP.
      ``output_scale="num_experts"`` makes up for that at every k, as inverted dropout does; ``output_scale="k"``
      multiplies by the number of active experts instead.

    Args:
        d_model: d, the model's width.
        d_hidden: H, the hidden width of the *whole* MLP; every expert gets h = H / N of it.
        num_experts: N.
        top_k: k at the start; None means N. Read and set it as ``layer.top_k``.
        activation: ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, or any elementwise function.
        router: ``random`` (fixed), ``learned``, ``uniform`` or ``hash`` (see :mod:`smoe.router`).
        score: ``softmax_after_topk`` (the released code), ``softmax_before_topk`` (the paper's Eq. 1) or ``sum``.
        output_scale: a multiplier on the output: a positive number, ``"k"`` or ``"num_experts"``.
        engine: ``torch``; ``fastmoe`` (needs fmoe and CUDA, see docs/fastmoe.md); ``auto``: torch, but FMoE if it is
            installed where torch would loop over the experts on a CUDA device.
        bias: whether both linear layers of an expert have a bias.
        gated: Llama-style experts, ``act(gate(x)) * up(x)``.
        dropout: rate of the dropout on the hidden units of every expert, 0 to 1.
        seed: of the router; None draws from PyTorch's global generator.
        vocab_size: the number of token ids, for the hash router only.
        compute: the path that computes the experts: ``auto`` or a name of ``smoe.compute.PATHS``.

    Shapes: ``(..., d) -> (..., d)``. With the hash router call ``layer(x, token_ids=ids)``, ids ``(...)``.

    Under ``torch.compile`` every k is a graph of its own, and after 8 of them PyTorch stops compiling. With
    ``torch._dynamo.config.allow_unspec_int_on_nn_module = True`` three graphs serve all k.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int = 16,
        top_k: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        router: RouterKind = "random",
        score: Score = "softmax_after_topk",
        output_scale: float | str = 1,
        engine: Engine = "auto",
        bias: bool = True,
        gated: bool = False,
        dropout: float = 0.0,
        seed: int | None = None,
        vocab_size: int | None = None,
        compute: str = "auto",
    ) -> None:
        super().__init__()
        d_expert = check_divisible(d_hidden, num_experts)
        self.d_model, self.d_hidden, self.num_experts = d_model, d_hidden, num_experts
        self.output_scale = check_output_scale(output_scale)
        self.compute = check_compute(compute)
        top_k = num_experts if top_k is None else top_k
        self.router = make_router(router, d_model, num_experts, top_k, score, vocab_size=vocab_size, seed=seed)
        self.experts = Experts(
            num_experts, d_model, d_expert, activation=activation, bias=bias, gated=gated, dropout=dropout
        )
        self.engine, self.fmoe = resolve_engine(engine, compute), None
        if self.engine != "torch":
            from .fastmoe import FastMoE

            self.fmoe = FastMoE(num_experts, d_model)  # has no parameters: state dicts are the same with every engine
        self.k_per_row: Tensor | None = None  # see smoe.activated
        # Takes tokens to experts on other ranks and back (see smoe.parallel); None if all experts are on this rank.
        self.dispatch: Dispatch | None = None

    @property
    def routers(self) -> list[Router]:
        """The router; if PEFT has wrapped it, the original and its trained copies, one of which chooses the experts."""
        return [self.router] if isinstance(self.router, Router) else unwrap(self.router, Router)

    @property
    def top_k(self) -> int:
        """k: the number of experts that each token activates. A new value takes effect with the next pass."""
        return self.routers[0].top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        for router in self.routers:
            router.top_k = value
        self.k_per_row = None

    @property
    def needs_token_ids(self) -> bool:
        """Whether ``forward`` needs ``token_ids`` (hash router)."""
        return self.routers[0].needs_token_ids

    @property
    def scale(self) -> float:
        """``output_scale`` as a number, at the current k."""
        return {"k": self.top_k, "num_experts": self.num_experts}.get(self.output_scale, self.output_scale)

    def reset_parameters(self, std: float | None = None) -> None:
        """Draws new weights for the experts (see ``Experts.reset_parameters``) and for the router if it is learned.

        A fixed router keeps its weights, which only its seed decides.
        """
        if self.dispatch is not None:
            raise ValueError("the experts are spread over ranks; call reset_parameters before parallelize")
        for experts in [self.experts] if isinstance(self.experts, Experts) else unwrap(self.experts, Experts):
            experts.reset_parameters(std)
        for router in self.routers:
            if any(True for _ in router.parameters()):
                router.reset_parameters(0.02 if std is None else std)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        if x.shape[-1:] != (self.d_model,):
            features = x.shape[-1] if x.dim() else "no"
            raise ValueError(f"x has {features} features; its last dimension must be d_model = {self.d_model}")
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}; it must have a floating-point dtype")
        if x.is_meta:
            raise ValueError("x is on the meta device, without values to route by; smoe.flops.count takes meta tensors")
        if not torch.is_grad_enabled() and (y := self._few_tokens(x)) is not None:
            return y
        flat = x.reshape(-1, self.d_model)
        if self.k_per_row is None:
            routing = self.router(flat, token_ids)
        else:
            k_per_token = k_of_tokens(self.k_per_row, x)
            routing = self.router(flat, token_ids, k_per_token)
        if self.k_per_row is not None and self.output_scale == "k":
            routing = routing._replace(weights=routing.weights * k_per_token.unsqueeze(1))
        elif self.output_scale != 1:  # before `scale`, which takes longer to find than a small product
            routing = routing._replace(weights=routing.weights * self.scale)
        y = self._mix(flat, routing) if self.dispatch is None else self.dispatch(flat, routing, self._mix)
        return y.view(x.shape)

    def _few_tokens(self, x: Tensor) -> Tensor | None:
        """y of few tokens by the way of their own; None if anything asks for the ordinary one."""
        if self.compute not in ("auto", "few") or not (self.k_per_row is self.dispatch is self.fmoe is None):
            return None
        modules = self._modules  # several times faster than attributes
        return few_tokens.forward(x, modules["router"], modules["experts"], 1 if self.output_scale == 1 else self.scale)

    def _mix(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, d) -> y (T, d) through the experts on this rank."""
        return self.experts(x, routing, self._compute)

    def _compute(self, x: Tensor, experts: Experts, routing: Routing) -> Tensor:
        """Called by the experts themselves, since ``self.experts`` may be a wrapper without their attributes (PEFT)."""
        if self.engine == "fastmoe":
            return self.fmoe(x, experts, routing)
        path = choose(self.compute, x, experts, routing)
        if self.fmoe is not None and not routing.absent:
            path = self.fmoe.replace(path, x)
        return path(x, experts, routing)

    def _replicate_for_data_parallel(self) -> SMoE:
        if self.k_per_row is not None:
            raise ValueError("k is a tensor, which torch.nn.DataParallel does not split with the batch; give one k")
        if self.dispatch is not None:
            raise ValueError(
                "torch.nn.DataParallel runs its replicas in threads, which cannot exchange tokens; wrap a parallelized "
                "model in DistributedDataParallel, with one process per GPU"
            )
        return super()._replicate_for_data_parallel()

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_hidden={self.d_hidden}, output_scale={self.output_scale}"
