"""Plain dropout made fast on a CPU, and the regularisers of the dense baselines: Concrete Dropout and DropBlock."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConcreteDropout(nn.Module):
    """Dropout with a learned rate (Gal et al. 2017; the paper's Algorithm 1).

    The Bernoulli mask is relaxed to a Concrete one, z = sigmoid((logit p + logit u) / t) with u ~ U(0, 1), so that p
    gets gradients. The mask acts when training alone; evaluating uses the plain input, as with dropout.

    Args:
        init_p: the rate at the start. temperature: t (0.1). weight_regularizer, dropout_regularizer: Algorithm 1's.
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
        """Any shape -> the same shape; drawn in float32 (1e-7 vanishes in bfloat16)."""
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

        weight_regularizer * |W|^2 / (1 - p) over ``next_layer``'s parameters, plus dropout_regularizer *
        num_features * (p log p + (1 - p) log(1 - p)), where num_features is the width of what is dropped.
        """
        p = self.p
        squares = sum(_whole(parameter.float().pow(2).sum()) for parameter in next_layer.parameters())
        entropy = p * torch.log(p) + (1 - p) * torch.log(1 - p)
        penalty = self.weight_regularizer * squares / (1 - p) + self.dropout_regularizer * num_features * entropy
        return penalty.squeeze()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def _whole(tensor: Tensor) -> Tensor:
    """The whole of it, where FSDP has sharded the parameter (between forward passes)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class DropBlock(nn.Module):
    """Drops runs of neighbouring features (Ghiasi et al. 2018; the paper's Algorithm 2).

    Block centres are drawn with the rate gamma that makes ``drop_prob`` of the features fall (Ghiasi et al., Eq. 1,
    in one dimension), every centre takes ``block_size`` features with it, and what is left is scaled up by the share
    that was kept, so that the expectation stays (Algorithm 2 leaves both out).

    Args:
        drop_prob: share of features to drop. block_size: an odd number of features, along the last dimension.
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


class Dropout(nn.Dropout):
    """`nn.Dropout`, several times faster on a CPU, where PyTorch draws one number an element; elsewhere the same as it.

    The rate is rounded to a multiple of 2^-16, and so is the scale, which keeps the expectation exact. Draws
    come from PyTorch's global generator, but other ones than `nn.Dropout` makes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < round(self.p * 65536) < 65536:
            return F.dropout(x, self.p, self.training, self.inplace)
        return x * dropout_noise(x.shape, self.p, x.dtype)


def dropout_noise(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """On the CPU, `shape` of 0 with probability `p` (to 2^-16), else 1 / (1 - p)."""
    dropped = round(p * 65536)  # of the 65536 values of a 16-bit integer
    # One 64-bit draw serves four elements.
    draws = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: shape.numel()].view(shape)
    first_kept = dropped - 32768
    # 0 or 1 by integer arithmetic, which is vectorised; comparing gives booleans, slow to multiply with.
    keep.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1)
    return keep.to(dtype).mul_(65536 / (65536 - dropped))
