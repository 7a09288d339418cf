"""The router that draws experts at random for each token and each pass (THOR, Zuo et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Router
from .routing import Routing


class UniformRouter(Router):
    """THOR's routing: k different experts, drawn uniformly for each token and each pass, also in evaluation.

    Draws from PyTorch's global generator of the device, so ``torch.manual_seed`` makes a run reproducible.
    """

    def forward(self, x: Tensor, token_ids: Tensor | None = None, k_per_token: Tensor | None = None) -> Routing:
        if self.top_k == self.num_experts and k_per_token is None:
            indices = self._all_experts(x)
        else:
            draw = torch.rand(x.shape[0], self.num_experts, dtype=torch.float32, device=x.device)
            indices = draw.topk(self.top_k, dim=-1).indices
        return self._routing(None, indices, k_per_token)
