"""An optimizer's state and PyTorch's generators as named tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """What the optimizer keeps per parameter, as ``state/<parameter>/<key>``.

    Its options (learning rate, decay) are not part of it: they follow from the configuration and the step.
    """
    return {
        f"state/{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def rng_tensors() -> dict[str, Tensor]:
    """The states of PyTorch's generator, and of this process's CUDA device if there is one."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():  # only the current device: asking the others would start a context on each
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors
