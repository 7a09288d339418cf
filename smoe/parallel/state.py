"""Whole tensors from the ranks' shards, and back: a checkpoint is written once and loads with any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fsdp import distribute, is_sharded
from .groups import ParallelGroups, communication_device
from .shard import expert_names, unwrap_model


@torch.no_grad()
def gather_state(tensors: Mapping[str, Tensor], model: nn.Module, groups: ParallelGroups) -> dict[str, Tensor] | None:
    """The whole tensors, as a single process would have them, on rank 0; None on the other ranks.

    Every rank calls it, with the same keys. Tensors of expert-parallel experts are concatenated along their first
    dimension, on the CPU; FSDP's shards are put together; everything else is returned as rank 0 has it.

    Args:
        tensors: a state dict of ``model``, with or without the prefixes of DDP and ``torch.compile``; or an
            optimizer's state with the parameter's name between slashes in the key:
            ``state/layers.0.mlp.experts.up/exp_avg``. A state without dimensions (a step count) is taken to be equal on
            all ranks.
        model: the parallelized model, with or without DDP around it.

    Raises:
        ValueError: a key names an expert parameter by another path than in ``model``; or a tensor is on the meta
            device, where accelerate's offloading leaves it.
    """
    names, whole = _expert_names(model, tensors), {}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device, without values; call gather_state before cpu_offload")
    # The ranks of the first group hold every expert; the others have nothing to send.
    for key in sorted(tensors):
        tensor = tensors[key]
        if is_sharded(tensor):  # moved to the CPU one by one: all of them may not fit on a device
            tensor = tensor.full_tensor().cpu()
        if not _is_of_experts(key, tensor, names):
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
    """This rank's shards of whole tensors, the inverse of :func:`gather_state` for any number of ranks.

    They fit ``model.load_state_dict``, or the state of an optimizer; with FSDP they are DTensors.

    Args:
        whole: what ``gather_state`` returned, or a checkpoint of a single process; the same on every rank.
        model: the parallelized model. For a model that is neither parallelized nor sharded, the tensors stay as they
            are.

    Raises:
        ValueError: a key names an expert parameter by another path than in ``model``.
    """
    names, shards = _expert_names(model, whole), {}
    # Tied parameters by each of their names, as in a state dict.
    parameters = dict(unwrap_model(model).named_parameters(remove_duplicate=False))
    for key, tensor in whole.items():
        if _is_of_experts(key, tensor, names):
            tensor = groups.scatter_experts(tensor).clone()
        parameter = next((parameters[part] for part in _parts(key) if part in parameters), None)
        if is_sharded(parameter) and tensor.shape == parameter.shape:
            tensor = distribute(tensor, parameter)
        shards[key] = tensor
    return shards


def _expert_names(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """The names of expert parameters in ``model``. ``keys`` must use them, or a shard would pass for a whole tensor."""
    names = expert_names(unwrap_model(model))
    for key in keys:
        parts = [part for part in _parts(key) if "experts." in part]
        if not names.isdisjoint(parts):
            continue
        for name in sorted(names):
            if any(part.endswith(f".{name}") or name.endswith(f".{part}") for part in parts):
                raise ValueError(f"{key} is called {name} in model; pass the model whose state dict this is")
    return names


def _is_of_experts(key: str, tensor: Tensor, names: set[str]) -> bool:
    """Whether the first dimension of ``tensor`` counts experts: a parameter, or what an optimizer keeps for it."""
    return tensor.dim() > 0 and not names.isdisjoint(_parts(key))


def _parts(key: str) -> list[str]:
    """The parts of a key, each also without the prefixes that DDP and torch.compile put in front."""
    parts = key.split("/")
    for part in parts:  # reaches the parts that are appended here, too
        for prefix in ("module.", "_orig_mod."):
            if part.startswith(prefix):
                parts.append(part.removeprefix(prefix))
    return parts
