"""Whole tensors from the ranks' slices, and back: a checkpoint is written once and loads at any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fsdp import distribute, is_sharded
from .groups import ParallelGroups, communication_device
from .shard import bare, expert_names


@torch.no_grad()
def gather_state(tensors: Mapping[str, Tensor], model: nn.Module, groups: ParallelGroups) -> dict[str, Tensor] | None:
    """The whole tensors, as one process without expert parallelism would have them; None on all ranks but 0.

    Every rank calls it, with the same keys. What belongs to spread experts is gathered along its first dimension, to
    the CPU; what FSDP shards is put together; everything else is passed on as rank 0 has it.

    Args:
        tensors: a state dict of ``model``, with or without the prefixes of DDP and ``torch.compile``, or an optimizer's
            state with the name of the parameter as one part of the key, between slashes:
            ``state/layers.0.mlp.experts.up/exp_avg``. A state without a dimension for the experts (a step count) counts
            as equal everywhere.
        model: the parallelized model, DDP around it or not.
    """
    names, whole = expert_names(bare(model)), {}
    # In the order of the first group, whose ranks hold every expert; the others have nothing to send.
    for key in sorted(tensors):
        tensor = tensors[key]
        if is_sharded(tensor):  # one after the other, and to the CPU: all together may not fit a device
            tensor = tensor.full_tensor().cpu()
        if not _is_spread(key, tensor, names):
            whole[key] = tensor
        elif groups.rank < groups.expert_parallel:
            part = tensor.detach().to(communication_device(tensor)).contiguous()
            parts = [torch.empty_like(part) for _ in range(groups.expert_parallel)] if groups.is_main else None
            dist.gather(part, parts, dst=0, group=groups.ep_group)
            if parts is not None:
                whole[key] = torch.cat([p.cpu() for p in parts])
    return {key: whole[key] for key in tensors} if groups.is_main else None


@torch.no_grad()
def shard_state(whole: Mapping[str, Tensor], model: nn.Module, groups: ParallelGroups) -> dict[str, Tensor]:
    """This rank's tensors of ``whole`` ones (the inverse of :func:`gather_state`), whatever number of ranks wrote them.

    With FSDP they are its shards, for ``model.load_state_dict`` and an optimizer's state alike.

    Args:
        whole: as ``gather_state`` returned it, or a checkpoint of one process; the same on every rank.
        model: the parallelized model; with one that is neither spread nor sharded, ``whole`` comes back as it is.
    """
    model = bare(model)
    names, mine = expert_names(model), {}
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a state dict has tied ones by each name
    for key, tensor in whole.items():
        if _is_spread(key, tensor, names):
            tensor = groups.scatter_experts(tensor).clone()
        parameter = next((parameters[part] for part in _parts(key) if part in parameters), None)
        if is_sharded(parameter) and tensor.shape == parameter.shape:  # FSDP's part of it
            tensor = distribute(tensor, parameter)
        mine[key] = tensor
    return mine


def _is_spread(key: str, tensor: Tensor, names: set[str]) -> bool:
    """All that an optimizer keeps for stacked experts has them as its first dimension, apart from scalars."""
    return tensor.dim() > 0 and not names.isdisjoint(_parts(key))


def _parts(key: str) -> list[str]:
    """The parts of a key, and what is left of them without the prefixes of wrappers."""
    parts = key.split("/")
    for part in parts:  # and what is appended meanwhile
        for prefix in ("module.", "_orig_mod."):
            if part.startswith(prefix):
                parts.append(part.removeprefix(prefix))
    return parts
