"""What methods add to the task loss: THOR's consistency and the penalty of Concrete Dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dense_dropout import ConcreteDropout
from .dense_mlp import DenseMLP


def symmetric_kl(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """(KL(a || b) + KL(b || a)) / 2 of the two softmax distributions, averaged over all positions (THOR's consistency).

    As Zuo et al. 2022 define it: a sum over the classes, of which half is taken. The paper's release takes the mean
    over the classes and does not halve, which is V / 2 times less for V classes; its alpha of 2 is 4 / V here.

    Shapes: both (..., classes) -> scalar. Both get gradients.
    """
    log_a = torch.log_softmax(logits_a.float(), dim=-1)
    log_b = torch.log_softmax(logits_b.float(), dim=-1)
    # KL(a||b) + KL(b||a) = sum (a - b) (log a - log b)
    return ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(-1).mean() / 2


def concrete_regularization(model: nn.Module) -> Tensor:
    """Sum of the Concrete Dropout penalties of all MLPs of ``model`` (Algorithm 1), a scalar.

    Raises:
        ValueError: the model has no :class:`DenseMLP` with :class:`ConcreteDropout`.
    """
    penalties = [
        mlp.dropout.regularization(mlp.down, mlp.down.in_features)
        for mlp in model.modules()
        if isinstance(mlp, DenseMLP) and isinstance(mlp.dropout, ConcreteDropout)
    ]
    if not penalties:
        raise ValueError(f"{type(model).__name__} has no DenseMLP with ConcreteDropout; there is no penalty to add")
    return torch.stack(penalties).sum()
