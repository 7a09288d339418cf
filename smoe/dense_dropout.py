"""The regularisers of the dense baselines: Concrete Dropout and DropBlock."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConcreteDropout(nn.Module):
    """Dropout with a learned rate p (Gal et al. 2017; the paper's Algorithm 1).

    The Bernoulli mask is relaxed to a Concrete one, z = sigmoid((logit p + logit u) / t) with u ~ U(0, 1), so that p
    gets gradients. It acts in training only, as dropout does.

    Args:
        init_p: p at the start, between 0 and 1.
        temperature: t.
        weight_regularizer, dropout_regularizer: coefficients of :meth:`regularization`.
    """

    def __init__(
        self,
        init_p: float = 0.1,
        *,
        temperature: float = 0.1,
        weight_regularizer: float = 1e-6,
        dropout_regularizer: float = 1e-5,
    ) -> None:
        super().__init__()
        if not 0 < init_p < 1:
            raise ValueError(f"init_p is {init_p}; a dropout rate to learn must start between 0 and 1, both excluded")
        self.temperature = temperature
        self.weight_regularizer = weight_regularizer
        self.dropout_regularizer = dropout_regularizer
        self.p_logit = nn.Parameter(torch.full((1,), math.log(init_p) - math.log(1 - init_p)))

    @property
    def p(self) -> Tensor:
        """The current rate, (1,) float32."""
        return torch.sigmoid(_whole(self.p_logit).float())

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape. The mask is computed in float32, since 1e-7 is lost in bfloat16."""
        if not self.training:
            return x
        eps = 1e-7
        noise = torch.rand(x.shape, device=x.device, dtype=torch.float32)
        p = self.p
        logit = torch.log(p + eps) - torch.log(1 - p + eps) + torch.log(noise + eps) - torch.log(1 - noise + eps)
        keep = torch.sigmoid(-logit / self.temperature) / (1 - p)
        return x * keep.to(x.dtype)

    def regularization(self, next_layer: nn.Module, num_features: int) -> Tensor:
        """Algorithm 1's penalty, a scalar to add to the loss.

        weight_regularizer * |W|^2 / (1 - p) over the parameters W of ``next_layer``, plus dropout_regularizer *
        num_features * (p log p + (1 - p) log(1 - p)), where num_features is the width of what is dropped: a mask has
        one unit per hidden unit. Algorithm 1's ``input[0].numel()`` is that for (B, H), and T times as much for
        (B, T, H).
        """
        p = self.p
        squares = sum(_whole(parameter.float().pow(2).sum()) for parameter in next_layer.parameters())
        entropy = p * torch.log(p) + (1 - p) * torch.log(1 - p)
        penalty = self.weight_regularizer * squares / (1 - p) + self.dropout_regularizer * num_features * entropy
        return penalty.squeeze()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor where FSDP has sharded it (between forward passes)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class DropBlock(nn.Module):
    """Drops runs of neighbouring features (Ghiasi et al. 2018; the paper's Algorithm 2).

    Centres of blocks are drawn at the rate gamma for which ``drop_prob`` of the features are dropped (Ghiasi et al.,
    Eq. 1, in one dimension). Every centre drops ``block_size`` features, and what is left is divided by the share that
    was kept, so that the expectation stays the same. (Algorithm 2 has neither the rate nor the division.)

    Args:
        drop_prob: share of features to drop, from 0 to below 1.
        block_size: an odd number of features, along the last dimension.
    """

    def __init__(self, drop_prob: float = 0.1, block_size: int = 7) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob is {drop_prob}; it must be at least 0 and below 1")
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1 or block_size % 2 == 0:
            raise ValueError(f"block_size is {block_size!r}; it must be an odd number of at least 1")
        self.drop_prob = drop_prob
        self.block_size = block_size

    def gamma(self, num_features: int) -> float:
        """The rate of block centres, for a last dimension of ``num_features``."""
        size = min(self.block_size, num_features)
        return self.drop_prob / size * num_features / (num_features - size + 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> the same shape."""
        if not self.training or self.drop_prob == 0:
            return x
        num_features = x.shape[-1]
        size = self.block_size
        # Centres lie where their block fits in, as in Ghiasi et al.
        low = min(size // 2, num_features - 1)
        high = max(num_features - size // 2, low + 1)
        centres = torch.zeros(x.reshape(-1, num_features).shape, device=x.device)
        centres[:, low:high] = torch.rand(centres[:, low:high].shape, device=x.device).lt(self.gamma(num_features))
        dropped = F.max_pool1d(centres.unsqueeze(1), size, stride=1, padding=size // 2).squeeze(1)
        keep = (1 - dropped).view(x.shape)
        scale = keep.numel() / keep.sum().clamp(min=1)
        return x * (keep * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, block_size={self.block_size}"
