"""The optimizer of every training: Adam, with decoupled weight decay where it is asked for."""

from __future__ import annotations

import re

import torch
from torch import nn

# Biases and norms, by their names in our models and in Hugging Face's.
_NO_DECAY = re.compile(r"bias|norm", re.IGNORECASE)


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW over all parameters of ``model``; biases and norms don't decay. Without decay it is Adam.

    The loop sets the learning rate of every step.
    """
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if _NO_DECAY.search(name) else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)
