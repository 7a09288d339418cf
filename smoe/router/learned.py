"""The trained router with Switch's load-balancing loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .balance import switch_loss
from .linear import LinearRouter
from .routing import LearnedRouting, PartialLearnedRouting, Routing


class LearnedRouter(LinearRouter):
    """The learnable SMoE baseline: the same linear layer, trained.

    Its ``balance_loss`` is Switch's, over all tokens (see ``smoe.balance_loss``).
    """

    trained = True

    def _routing(self, logits: Tensor, indices: Tensor, k_per_token: Tensor | None) -> Routing:
        routing = super()._routing(logits, indices, k_per_token)
        probabilities = torch.softmax(logits, dim=-1)
        balance_loss = switch_loss(probabilities, routing.indices, routing.absent)
        weights = routing.weights
        if self.score == "sum":
            # Weights of 1 leave the router out of the graph, and DDP fails on a parameter without a gradient.
            weights = weights + 0.0 * logits.gather(1, indices)
        kind = PartialLearnedRouting if routing.absent else LearnedRouting
        learned = kind(routing.indices, weights, balance_loss)
        learned.probabilities = probabilities
        return learned
