"""What a method can be told: which layers have experts, how many, how they are chosen, and how k moves."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import nn

from .engine import Engine
from .experts import check_divisible
from .layer import check_output_scale
from .methods import METHODS, Method, MethodName, get_method
from .modulize.layers import LayerNames, chosen_layers
from .options import check_bounds, option, required
from .router import RouterKind, Score
from .schedule import Mode, ks_at

# What only experts have. It must not be asked of a model without any: the run would be named after it.
_ONLY_EXPERTS = ("k_min", "k_max", "schedule", "router", "score", "output_scale", "balance_weight", "layers")
_ONLY_EXPERTS += ("expert_dropout", "engine", "expert_parallel")
_LARGEST_SEED = 2**53  # the routers' seeds are a thousand times that, and must fit into 64 bits


@dataclass(frozen=True)
class MethodConfig:
    """A method, its options, and the sizes of the MLPs that it makes."""

    method: MethodName = required("a row of Table 1")
    _: KW_ONLY
    seed: int = option(1, "of weights, routers, data order, masks, dropout", at_least=0, at_most=_LARGEST_SEED)
    steps: int = option(400_000, "optimizer steps", at_least=1)

    num_layers: int = option(4, "transformer layers", at_least=1)
    d_model: int = option(256, "model width", at_least=1)
    d_hidden: int = option(8192, "width of the MLP, all experts together", at_least=1)
    dropout: float = option(
        0.1, "inside a dense MLP, and wherever residual_dropout says nothing else", at_least=0, below=1
    )
    expert_dropout: float = option(0.0, "on the hidden units of every expert", at_least=0, below=1)

    num_experts: int = option(16, "N, the experts an MLP is cut into", at_least=1)
    layers: LayerNames | tuple[int, ...] = option("all", "which have experts: names of halves, or indices from 0")
    k_min: int | None = option(None, "activated experts at the start; null: the method's own")
    k_max: int | None = option(None, "activated experts at the end; null: the method's own")
    schedule: Mode | None = option(None, "how k moves from k_min to k_max; null: the method's own")
    router: RouterKind | None = option(None, "where tokens go; null: the method's own")
    score: Score = option("softmax_after_topk", "how router logits become weights")
    output_scale: float | Literal["k", "num_experts"] = option(1, "a multiplier on an SMoE layer's output")
    balance_weight: float | None = option(None, "of the load-balancing loss; null: the method's own", at_least=0)
    consistency_weight: float | None = option(None, "of THOR's consistency loss; null: the method's own", at_least=0)
    engine: Engine = option("auto", "what computes the experts: torch, fastmoe (needs fmoe and CUDA), or auto")
    expert_parallel: int = option(1, "processes that share the experts of a layer; 1: each has all of them", at_least=1)

    def __post_init__(self) -> None:
        """ValueError in one line for a field that can't be used."""
        method = get_method(self.method)
        check_bounds(self)
        check_output_scale(self.output_scale)
        if method.routed:
            self._check_routed()
            return
        for name in _ONLY_EXPERTS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}, but {self.method} has no experts; leave {name} out")
        if method.dropout == "concrete" and self.dropout == 0:
            raise ValueError(f"dropout is 0.0; {self.method} learns its rate and must start above 0")

    def _check_routed(self) -> None:
        check_divisible(self.d_hidden, self.num_experts)
        chosen_layers(self.layers, self.num_layers)
        if self.num_experts % self.expert_parallel:
            allowed = f"a divisor of num_experts = {self.num_experts}"
            raise ValueError(f"expert_parallel is {self.expert_parallel}; it must be {allowed}")
        k_min, k_max, _ = self.k_schedule()
        if not 1 <= k_min <= k_max <= self.num_experts:
            allowed = f"1 <= k_min <= k_max <= num_experts = {self.num_experts}"
            raise ValueError(f"k_max is {k_max}, k_min is {k_min}; it must be {allowed}")

    def get_method(self) -> Method:
        """The method's builder, losses and defaults."""
        return METHODS[self.method]

    def k_schedule(self) -> tuple[int, int, str]:
        """(k_min, k_max, mode); what is not given comes from the method."""
        method = self.get_method()
        k_max = method.k_max(self.num_experts) if self.k_max is None else self.k_max
        k_min = min(method.k_min(self.num_experts), k_max) if self.k_min is None else self.k_min
        return k_min, k_max, method.schedule if self.schedule is None else self.schedule

    def smoe_layers(self) -> list[int]:
        """The indices of the layers that have experts; none for a dense method."""
        return chosen_layers(self.layers, self.num_layers) if self.get_method().routed else []

    def ks_at(self, step: int) -> list[int]:
        """Activated experts of every SMoE layer at a training step; empty for a dense method."""
        k_min, k_max, mode = self.k_schedule()
        return ks_at(step, self.steps, [(k_min, k_max)] * len(self.smoe_layers()), mode, seed=self.seed)

    def make_mlp(self, layer: int, **options: Any) -> nn.Module:
        """A fresh MLP for transformer layer ``layer``; ``options`` (activation, vocab_size) go to its maker.

        Weights come from PyTorch's global generator, fixed routers from ``seed`` and ``layer`` alone. In a layer that
        ``layers`` leaves out it is the dense MLP with dropout.
        """
        sizes = {"d_model": self.d_model, "d_hidden": self.d_hidden, "dropout": self.dropout}
        if layer not in self.smoe_layers():
            method = METHODS["dense_dropout"] if self.get_method().routed else self.get_method()
            options.pop("vocab_size", None)
            return method.make_mlp(**sizes, **options)
        options |= {name: getattr(self, name) for name in ("num_experts", "score", "output_scale", "router", "engine")}
        options |= {"top_k": self.k_schedule()[0], "seed": 1000 * self.seed + layer}
        options["expert_dropout"] = self.expert_dropout
        return self.get_method().make_mlp(**sizes, **options)
