"""The trained router with Switch's load-balancing loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .balance import switch_loss
from .base import LearnedRouting, Routing
from .linear import LinearRouter


class LearnedRouter(LinearRouter):
    """The learnable SMoE baseline: the same linear layer, trained.

    Its ``balance_loss`` is Switch's, over all tokens (see ``smoe.balance_loss``).
    """

    trained = True

    def _routing(self, logits: Tensor, indices: Tensor) -> Routing:
        probabilities = torch.softmax(logits, dim=-1)
        balance_loss = switch_loss(probabilities, indices)
        weights = self._weights(logits, indices)
        if self.score == "sum":
            # Weights of 1 leave the router out of the graph, and DDP fails on a parameter without a gradient.
            weights = weights + 0.0 * logits.gather(1, indices)
        routing = LearnedRouting(indices, weights, balance_loss)
        routing.probabilities = probabilities
        return routing
