"""The paper's methods by name: the MLP that each one builds, its losses and its k schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .control import record_routing
from .dense_dropout import ConcreteDropout, DropBlock
from .dense_mlp import DenseMLP
from .dropout import Dropout
from .layer import SMoE
from .losses import concrete_regularization, symmetric_kl
from .router import RouterKind
from .schedule import Mode

MethodName = Literal["dense_dropout", "dense_concrete_dropout", "dense_dropblock", "thor", "smoe", "smoe_dropout"]


class PassOutput(Protocol):
    """What one forward pass of a model returns: a mean loss (scalar) and logits (..., classes)."""

    loss: Tensor
    logits: Tensor


@dataclass(frozen=True)
class MethodLoss:
    """What a method minimises on one batch.

    Attributes:
        total: the sum to minimise.
        task: the model's own loss (for BPC).
        parts: the auxiliary losses by name, without their coefficients.
        output: what the (first) forward pass returned.
    """

    total: Tensor
    task: Tensor
    parts: dict[str, Tensor]
    output: Any


@dataclass(frozen=True)
class Method:
    """One row of Table 1.

    Attributes:
        name, title: the key in ``METHODS`` and the paper's name.
        router: the router of its SMoE layers; None for a dense method.
        dropout: the dropout in the MLP of a dense method: ``plain``, ``concrete`` or ``dropblock``.
        schedule: the mode of its k schedule (``smoe.schedule.MODES``).
        k_min, k_max: its k as functions of N.
        balance_weight: coefficient of the load-balancing loss (0.01 as in Fedus et al. 2021).
        consistency_weight: alpha of THOR's consistency loss (2, by the paper's grid search); 0 means one forward pass.
    """

    name: MethodName
    title: str
    router: RouterKind | None = None
    dropout: Literal["plain", "concrete", "dropblock"] = "plain"
    schedule: Mode = "constant"
    k_min: Callable[[int], int] = lambda n: min(2, n)
    k_max: Callable[[int], int] = lambda n: min(2, n)
    balance_weight: float = 0.0
    consistency_weight: float = 0.0

    @property
    def routed(self) -> bool:
        """Whether its MLPs are SMoE layers."""
        return self.router is not None

    def make_mlp(
        self,
        d_model: int,
        d_hidden: int,
        *,
        num_experts: int = 16,
        dropout: float = 0.1,
        expert_dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        router: RouterKind | None = None,
        **layer_options: Any,
    ) -> nn.Module:
        """The MLP of one transformer layer, (..., d) -> (..., d).

        Args:
            dropout: the rate in the MLP of a dense method.
            expert_dropout: the rate on the hidden units of experts, besides leaving out experts (0.1 in the release).
            router: replaces the method's own router (the ablations of Figure 5 (c)).
            layer_options: of :class:`SMoE`: top_k, score, output_scale, seed, vocab_size, ...

        Raises:
            ValueError: a dense method is given a router or layer_options, or Concrete Dropout a rate of 0, from which
                it could not learn.
        """
        if self.router is not None:
            layer_options.setdefault("top_k", self.k_max(num_experts))
            router = router or self.router
            layer_options |= {"activation": activation, "router": router, "dropout": expert_dropout}
            return SMoE(d_model, d_hidden, num_experts, **layer_options)
        for option in (*layer_options, *(["router"] if router else [])):
            raise ValueError(f"{option} is an option of SMoE layers, but {self.name} has none; leave it out")
        if self.dropout == "concrete" and not dropout > 0:
            raise ValueError(f"dropout is {dropout}; {self.name} learns its rate and must start above 0")
        kind = {"plain": Dropout, "concrete": ConcreteDropout, "dropblock": DropBlock}[self.dropout]
        return DenseMLP(d_model, d_hidden, activation=activation, dropout=kind(dropout))

    def loss(
        self,
        model: nn.Module,
        forward: Callable[[], PassOutput],
        *,
        balance_weight: float | None = None,
        consistency_weight: float | None = None,
    ) -> MethodLoss:
        """Everything that this method minimises.

        Args:
            model: its SMoE and ConcreteDropout layers are read.
            forward: runs one forward pass of ``model`` on the current batch; called twice for THOR.
            balance_weight, consistency_weight: replace the method's own.
        """
        balance_weight = self.balance_weight if balance_weight is None else balance_weight
        consistency_weight = self.consistency_weight if consistency_weight is None else consistency_weight
        parts: dict[str, Tensor] = {}
        with record_routing(model) if balance_weight else nullcontext([]) as routings:
            output = forward()
            task = total = output.loss
            if consistency_weight:
                second = forward()
                task = (task + second.loss) / 2
                parts["consistency"] = symmetric_kl(output.logits, second.logits)
                total = task + consistency_weight * parts["consistency"]
        balance = [routing.balance_loss for routing in routings if routing.balance_loss is not None]
        if balance:
            # A mean over the passes, like the task loss, so that the weight means the same with one pass or two.
            parts["balance"] = torch.stack(balance).sum() / (2 if consistency_weight else 1)
            total = total + balance_weight * parts["balance"]
        if self.dropout == "concrete":
            parts["concrete"] = concrete_regularization(model)
            total = total + parts["concrete"]
        return MethodLoss(total, task, parts, output)


_SMOE_DROPOUT = {"router": "random", "schedule": "linear", "k_min": lambda n: max(n // 2, 1), "k_max": lambda n: n}
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense_dropout", "Dense w. Dropout"),
        Method("dense_concrete_dropout", "Dense w. Concrete Dropout", dropout="concrete"),
        Method("dense_dropblock", "Dense w. DropBlock", dropout="dropblock"),
        Method("thor", "THOR", router="uniform", consistency_weight=2.0),
        Method("smoe", "SMoE", router="learned", balance_weight=0.01),
        Method("smoe_dropout", "SMoE-Dropout", **_SMOE_DROPOUT),
    )
}


def get_method(name: str) -> Method:
    """``METHODS[name]``, or a ValueError that lists the names."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(METHODS)}")
    return METHODS[name]
