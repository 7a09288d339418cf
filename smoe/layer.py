"""SMoE: router + experts + k, the drop-in for a transformer's MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .compute import check_compute, choose
from .engine import make_fastmoe, replace_grouped, resolve_engine
from .experts import Experts, check_divisible
from .router import Routing, make_router

if TYPE_CHECKING:
    from .parallel.dispatch import Dispatch


def check_output_scale(value: float | str) -> float | str:
    """value itself if it is a positive number, ``"k"`` or ``"num_experts"``, else a ValueError that says so."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    if not numeric and value not in ("k", "num_experts"):
        raise ValueError(f"output_scale is {value!r}; it must be 'k', 'num_experts' or a positive number")
    return value


class SMoE(nn.Module):
    """A transformer's MLP cut into N experts of which each token activates k.

    ``y[t] = output_scale * sum_j weights[t, j] * E_indices[t, j](x[t])`` (the paper's Eq. 1).

    Args:
        d_model: d, the model's width.
        d_hidden: H, the hidden width of the *whole* MLP; every expert gets h = H / N of it.
        num_experts: N.
        top_k: k at the start; None means N. Read and set as ``layer.top_k``, here and nowhere else.
        activation: ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, or any elementwise function.
        router: ``random`` (fixed), ``learned``, ``uniform`` or ``hash``.
        score: ``softmax_after_topk`` (released code), ``softmax_before_topk`` (the paper's Eq. 1), ``sum`` (weights 1).
        output_scale: a number, ``"k"`` or ``"num_experts"``: one multiplier on the output. With softmax scores the
            weights sum to 1, so the layer starts N times smaller than the dense MLP it replaces; ``"num_experts"``
            makes up for it the way inverted dropout does, ``"k"`` by the number of experts that are active.
        engine: ``torch``; ``fastmoe`` (needs fmoe and CUDA, see docs/fastmoe.md); ``auto``: torch, and where it would
            loop over the experts on a CUDA device, FMoE if fmoe is installed.
        bias: whether both linear layers of an expert have one.
        gated: Llama-style experts, ``act(gate(x)) * up(x)``.
        dropout: rate of a dropout on the hidden units, for models that have one there; while it drops anything the
            ``reference`` path computes the experts.
        seed: fixes the router's draw; None draws from PyTorch's global generator.
        vocab_size: the number of token ids; the hash router alone needs it.
        compute: how the experts are computed: ``auto``, or a path by name (see ``smoe.compute``).

    Under ``torch.compile`` every k is a graph of its own, and after 8 of them PyTorch gives up compiling. With
    ``torch._dynamo.config.allow_unspec_int_on_nn_module = True`` three graphs serve all k.

    Shapes: ``(..., d) -> (..., d)``. With the hash router call ``layer(x, token_ids=ids)``, ids ``(...)``.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int = 16,
        top_k: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        router: str = "random",
        score: str = "softmax_after_topk",
        output_scale: float | str = 1,
        engine: str = "auto",
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
        # Has no parameters: what there is to save is the same with every engine.
        self.engine = resolve_engine(engine, compute)
        self.fmoe = make_fastmoe(self.engine, num_experts, d_model)
        # Takes tokens to experts on other ranks and back (see smoe.parallel); None: all experts are here.
        self.dispatch: Dispatch | None = None

    @property
    def top_k(self) -> int:
        """k: the number of experts each token activates. Setting it takes effect with the next pass."""
        return self.router.top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.router.top_k = value

    @property
    def needs_token_ids(self) -> bool:
        """Whether ``forward`` must be given ``token_ids`` (hash router)."""
        return self.router.needs_token_ids

    @property
    def scale(self) -> float:
        """The multiplier that ``output_scale`` amounts to at the current k."""
        return {"k": self.top_k, "num_experts": self.num_experts}.get(self.output_scale, self.output_scale)

    def reset_parameters(self, std: float | None = None) -> None:
        """Draws the experts' weights anew (see ``Experts.reset_parameters``), and the router's if it is learned.

        A fixed router stays as it is: its seed alone decides it.
        """
        if self.dispatch is not None:
            raise ValueError("the experts are spread over ranks; draw weights before parallelize, whole")
        self.experts.reset_parameters(std)
        if any(True for _ in self.router.parameters()):
            self.router.reset_parameters(0.02 if std is None else std)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        if x.shape[-1:] != (self.d_model,):
            features = x.shape[-1] if x.dim() else "no"
            raise ValueError(f"x has {features} features; its last dimension must be d_model = {self.d_model}")
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}; it must be of a floating-point type")
        if x.is_meta:
            raise ValueError("x is on the meta device, without values to route by; smoe.flops.count takes such a model")
        flat = x.reshape(-1, self.d_model)
        routing = self.router(flat, token_ids)
        if self.scale != 1:
            routing = routing._replace(weights=routing.weights * self.scale)
        y = self._mix(flat, routing) if self.dispatch is None else self.dispatch(flat, routing, self._mix)
        return y.view(x.shape)

    def _mix(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, d) -> y (T, d) through the experts that are here."""
        if self.engine == "fastmoe":
            return self.experts(x, routing, self.fmoe)
        # A path with its own backward computes the activation twice, which would drop other units the second time.
        compute = "reference" if self.experts.drops else self.compute
        path = choose(compute, x, self.experts, routing)
        return self.experts(x, routing, replace_grouped(path, self.fmoe, x))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_hidden={self.d_hidden}, output_scale={self.output_scale}"
