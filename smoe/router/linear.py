"""Routers whose logits are a linear layer of the tokens, fixed or trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Score, generator
from .logits import Float32Logits
from .routing import Routing


class LinearRouter(Router):
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
        """Draws the weights (see :meth:`draw`) and sets the bias to 0."""
        with torch.device("cpu"):  # whatever the device and dtype, so that a seed gives the same router everywhere
            self.weight.copy_(self.draw(std))
        self.bias.zero_()

    def draw(self, std: float) -> Tensor:
        """The initial weights (N, d), N(0, std), in float32; a router that wants others overrides this."""
        return std * torch.randn(self.weight.shape, generator=generator(self.seed), dtype=torch.float32)

    def logits(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, N), always in float32: rounded logits would change which experts are chosen."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
            if x.dtype == torch.float32 or transformed:  # the transforms of torch.func need plain autograd
                return F.linear(x.float(), weight, bias)
            return Float32Logits.apply(x, weight, bias)

    def forward(self, x: Tensor, token_ids: Tensor | None = None, k_per_token: Tensor | None = None) -> Routing:
        logits = self.logits(x)
        if self.top_k == self.num_experts and k_per_token is None:
            indices = self._all_experts(x)
        else:
            indices = logits.topk(self.top_k, dim=-1).indices
        return self._routing(logits, indices, k_per_token)

    def choice(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The routing of x (T, d) float32 in as few operators as it takes, without gradients and balance loss.

        Returns:
            indices (T, k), None if all experts are chosen, in their order; and weights (T, k), None if all are 1.
        """
        all_experts, equal = self._top_k == self.num_experts, self.score == "sum"
        if all_experts and equal:
            return None, None
        logits = F.linear(x, self.weight, self.bias)
        if all_experts:
            return None, torch.softmax(logits, dim=-1)
        indices = logits.topk(self._top_k, dim=-1)[1]
        return indices, None if equal else self._weights(logits, indices)
