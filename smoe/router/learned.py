"""The trained router with Switch's load-balancing loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Routing
from .linear import LinearRouter


class LearnedRouter(LinearRouter):
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
