"""Switch's load-balancing loss, over all tokens or over those that count."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, zeros_like

from .routing import Routing


def balance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Switch's load-balancing loss of the tokens that count, a scalar.

    Args:
        routing: of a learned router, as ``smoe.record_routing`` yields them.
        mask: one entry per token, in any shape; tokens where it is 0 (padding) don't count. With None this is
            ``routing.balance_loss``.

    Raises:
        ValueError: the routing has no probabilities (its router is not learned), or the mask has another size.
    """
    probabilities, indices = routing.probabilities, routing.indices
    if probabilities is None:
        raise ValueError("routing has no probabilities; only a learned router's does, as record_routing yields it")
    if mask is not None:
        if mask.numel() != len(indices):
            raise ValueError(f"mask has {mask.numel()} entries; it must have one for each of the {len(indices)} tokens")
        tokens = mask.reshape(-1).to(indices.device) != 0
        probabilities, indices = probabilities[tokens], indices[tokens]
    return switch_loss(probabilities, indices, routing.absent)


def switch_loss(probabilities: Tensor, indices: Tensor, absent: bool = False) -> Tensor:
    """N * sum_i f_i * P_i, 1 when balanced (Fedus et al. 2021, Eq. 4); 0 if there is no token.

    f_i is the fraction of the (token, slot) pairs that went to expert i, P_i the mean over tokens of its probability.
    The paper's release divides by k once more, so that its loss is 1 / k when balanced.
    Shapes: (T, N), (T, k) -> scalar. absent: whether there are empty slots, with index -1, which don't count.
    """
    if probabilities.shape[0] == 0:
        return probabilities.sum()
    num_experts = probabilities.shape[1]
    if absent:
        chosen = zeros_like(F.pad(probabilities, (0, 1)))  # the last column is for empty slots
        chosen = chosen.scatter_(1, indices.remainder(num_experts + 1), 1.0)[:, :num_experts]
        fraction = chosen.sum(0) / chosen.sum()
    else:
        chosen = zeros_like(probabilities).scatter_(1, indices, 1.0)
        fraction = chosen.mean(0) / indices.shape[1]
    return num_experts * (fraction * probabilities.mean(0)).sum()
