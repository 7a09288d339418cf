"""FSDP2 (``fully_shard``) for models that do not fit on one device, alone or with expert parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..control import smoe_layers
from .groups import ParallelGroups
from .shard import parallelized_layers


def fully_shard_model(
    model: nn.Module, groups: ParallelGroups, *, blocks: Iterable[nn.Module] | None = None, **options: Any
) -> nn.Module:
    """Shards parameters, gradients and optimizer state of ``model`` over the ranks with FSDP2, in place; returns it.

    The experts of parallelized layers are sharded over the ranks that hold the same ones, everything else over all W
    ranks. Use it instead of DDP, after ``parallelize`` and before the optimizer::

        model = parallelize(model, groups)
        model = fully_shard_model(model, groups)
        optimizer = torch.optim.AdamW(model.parameters())
        ...
        model(batch).backward()
        clip_grad_norm_(model, max_norm, groups)        # or sync_expert_gradients, as without FSDP
        optimizer.step()

    ``gather_state`` and ``shard_state`` convert between whole tensors and the shards. Gradient accumulation needs
    nothing more: FSDP reduces the gradients in each backward pass and adds them up.

    Args:
        blocks: the modules that FSDP gathers one at a time; None: the elements of each ``ModuleList`` that hold SMoE
            layers (a transformer's layers).
        options: of ``torch.distributed.fsdp.fully_shard`` (``reshard_after_forward``, ``mp_policy``,
            ``offload_policy``).

    Raises:
        ValueError: there is only one rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if groups.world_size == 1:
        raise ValueError("world_size is 1; FSDP shards over several ranks: start them with torchrun, or leave out FSDP")
    device = next(model.parameters()).device.type
    shape = (groups.expert_data_parallel, groups.expert_parallel)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("expert_data", "expert"))
    all_ranks = mesh._flatten("all_ranks") if 1 not in shape else mesh["expert" if shape[0] == 1 else "expert_data"]
    blocks = list(_blocks(model) if blocks is None else blocks)
    local_experts = {id(layer.experts): layer.experts for _, layer in parallelized_layers(model)}.values()
    for experts in local_experts:
        # Also if only one rank holds them: optimizers cannot step DTensors and plain tensors together.
        # Routing weights stay in float32 whatever the policy casts the parameters to.
        policy = dataclasses.replace(options.get("mp_policy", MixedPrecisionPolicy()), cast_forward_inputs=False)
        place = _placement(groups.expert_data_parallel)
        fully_shard(experts, mesh=mesh["expert_data"], shard_placement_fn=place, **(options | {"mp_policy": policy}))
    for module in (*blocks, model):
        fully_shard(module, mesh=all_ranks, shard_placement_fn=_placement(groups.world_size), **options)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost elements of module lists that hold SMoE layers, in the model's order."""
    holders = [name for name, _ in smoe_layers(model)]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for key, element in module.named_children():
            path = f"{name}.{key}" if name else key
            inner = any(path.startswith(f"{outer}.") for outer in found)
            if not inner and any(holder == path or holder.startswith(f"{path}.") for holder in holders):
                found[path] = element
    return list(found.values())


def _placement(ranks: int) -> Any:
    """Shards along the first dimension that divides evenly: 16 experts over 64 ranks would leave most ranks empty."""
    from torch.distributed.tensor import Shard

    def place(parameter: nn.Parameter) -> Shard | None:
        even = [dim for dim, size in enumerate(parameter.shape) if size % ranks == 0]
        return Shard(even[0]) if even else None

    return place


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, of which this rank holds FSDP's shard."""
    return hasattr(tensor, "to_local")  # isinstance would need a slow import


def distribute(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of ``whole``, laid out as the DTensor ``like``. All ranks have ``whole``; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
