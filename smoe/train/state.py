"""An optimizer's state and PyTorch's generators as named tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping

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


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Puts back what :func:`optimizer_tensors` took, bit for bit, in the dtypes it had.

    For a parameter that has never had a gradient there is nothing to put back. Raises ValueError, before anything
    changes, when the checkpoint has a parameter that the model lacks.
    """
    parameters = dict(model.named_parameters())
    kept: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        _, name, key = path.split("/")
        kept.setdefault(name, {})[key] = value
    for name in sorted(kept.keys() - parameters.keys()):
        raise ValueError(f"optimizer: parameter {name!r} is only in the checkpoint")
    for name, values in kept.items():
        device = parameters[name].device
        # A copy: the optimizer changes its own in place.
        optimizer.state[parameters[name]] = {key: value.to(device, copy=True) for key, value in values.items()}


def rng_tensors() -> dict[str, Tensor]:
    """The states of PyTorch's generator, and of this process's CUDA device if there is one."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():  # only the current device: asking the others would start a context on each
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`rng_tensors` returned. A CUDA state is skipped where there is no CUDA device."""
    torch.set_rng_state(tensors["torch"].cpu())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].cpu())
