"""Expert layers of other projects, wrapped to be timed beside ours. Those that can't be imported are left out.

Every wrapper holds experts of the same sizes, and routes with our fixed random router where the peer allows it, so that
only the computation of the experts differs. st-moe-pytorch and mixture-of-experts can't be compared this way: the first
drops tokens beyond a capacity and has gated experts, the second supports only k = 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from smoe import RandomRouter

# Hugging Face's batched experts copy the weights of an expert for every (token, choice): they are made for decoding.
MOST_BATCHED_BYTES = 2 << 30


class HuggingFaceExperts(nn.Module):
    """The experts of transformers' ``integrations/moe.py``; ``kind``: ``grouped`` or ``batched``."""

    def __init__(self, d: int, num_experts: int, h: int, k: int, activation: nn.Module, kind: str) -> None:
        super().__init__()
        from transformers.integrations import moe

        self._forward = {"grouped": moe.grouped_mm_experts_forward, "batched": moe.batched_mm_experts_forward}[kind]
        self.num_experts, self.act_fn, self.router = num_experts, activation, RandomRouter(d, num_experts, k)
        self.has_gate, self.has_bias, self.is_transposed = False, True, False
        self._is_expert_parallel = self.has_post_expert_norm = False
        self.weights = nn.ParameterDict(
            {
                "up_proj": torch.randn(num_experts, h, d) * d**-0.5,
                "up_proj_bias": torch.zeros(num_experts, h),
                "down_proj": torch.randn(num_experts, d, h) * (num_experts * h) ** -0.5,
                "down_proj_bias": torch.zeros(num_experts, d),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        for name, weight in self.weights.items():
            object.__setattr__(self, name, weight.to(dtype))
        return self._forward(self, x.to(dtype), routing.indices, routing.weights.to(dtype))


class FastMoE(nn.Module):
    """fastmoe's FMoETransformerMLP with its naive gate (CUDA)."""

    def __init__(self, d: int, num_experts: int, h: int, k: int, activation: nn.Module) -> None:
        super().__init__()
        from fmoe.transformer import FMoETransformerMLP

        self.layer = FMoETransformerMLP(num_experts, d, h, activation=activation, top_k=k)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ScatterMoE(nn.Module):
    """scattermoe's MLP (Triton) behind our router."""

    def __init__(self, d: int, num_experts: int, h: int, k: int, activation: nn.Module) -> None:
        super().__init__()
        from scattermoe.mlp import MLP

        self.router = RandomRouter(d, num_experts, k)
        self.layer = MLP(input_size=d, hidden_size=h, num_experts=num_experts, top_k=k, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x)
        return self.layer(x, routing.weights.to(x.dtype), routing.indices)


class MegaBlocks(nn.Module):
    """megablocks' dropless MoE (CUDA), which has its own learned router."""

    def __init__(self, d: int, num_experts: int, h: int, k: int, activation: nn.Module) -> None:
        super().__init__()
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        arguments = Arguments(
            hidden_size=d, ffn_hidden_size=h, moe_num_experts=num_experts, moe_top_k=k, activation_fn=activation
        )
        self.layer = dMoE(arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(1))[0].squeeze(1)


def peers(
    d: int, num_experts: int, h: int, tokens: int, k: int, activation: Callable, device: str
) -> dict[str, nn.Module]:
    """Name -> layer, for every peer that can be built here."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "hf grouped": lambda: HuggingFaceExperts(d, num_experts, h, k, activation(), "grouped")
    }
    if tokens * k * h * d * 4 <= MOST_BATCHED_BYTES:
        makers["hf batched"] = lambda: HuggingFaceExperts(d, num_experts, h, k, activation(), "batched")
    if device == "cuda":
        for name, wrapper in (("fastmoe", FastMoE), ("scattermoe", ScatterMoE), ("megablocks", MegaBlocks)):
            makers[name] = lambda wrapper=wrapper: wrapper(d, num_experts, h, k, activation())
    built = {}
    for name, make in makers.items():
        try:
            built[name] = make()
        except ImportError:
            continue
    return built
