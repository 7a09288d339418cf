"""Every rank keeps the experts that are local to it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..control import smoe_layers
from ..experts import Experts
from ..layer import SMoE
from ..wrappers import is_offloaded
from .dispatch import Dispatch
from .groups import ParallelGroups, communication_device


def parallelize(model: nn.Module, groups: ParallelGroups) -> nn.Module:
    """Makes every SMoE layer of ``model`` expert parallel over ``groups``, in place, and returns the model.

    Rank r of an expert-parallel group keeps the local experts ``r * N / E .. (r + 1) * N / E - 1`` of rank 0's model:
    the parameters keep their names, and their first dimension becomes N / E. Routers stay whole and become equal to
    rank 0's. The layer's ``num_experts``, ``top_k``, ``record_routing`` and ``set_top_k`` still count all N experts.

    Call it on every rank with the whole model, before the optimizer, DDP and ``torch.compile``: the parameters are
    new. Modulize, slim, and count parameters and FLOPs before it. With E = 1 the model stays as it is.

    Raises:
        ValueError: E does not divide the N of a layer; a layer is parallelized already; PEFT has wrapped its experts;
            or accelerate has offloaded them. Nothing is changed then.
    """
    layers = smoe_layers(model)
    size = groups.expert_parallel
    for name, layer in layers if size > 1 else ():
        where = f"layer {name}" if name else "the layer"
        if layer.num_experts % size:
            raise ValueError(f"{where} has {layer.num_experts} experts, which expert_parallel = {size} does not divide")
        if layer.dispatch is not None:
            raise ValueError(f"{where} is parallelized already; call parallelize once per model")
        _check_plain_experts(where, layer)
        if is_offloaded(layer.experts) or is_offloaded(layer.router):
            raise ValueError(f"accelerate has offloaded {where}; call parallelize before cpu_offload")
        if layer.engine == "fastmoe":
            from ..fastmoe import check_spread

            check_spread(groups)
    if size == 1:
        return model
    seen: set[int] = set()
    for _, layer in layers:
        for tensor in (*layer.router.parameters(), *layer.router.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensor.data.copy_(_from_rank_0(tensor.data))
        if id(layer.experts) not in seen:  # layers may share their experts
            seen.add(id(layer.experts))
            _keep_local_experts(layer, groups)
        fastmoe = layer.engine == "fastmoe"
        layer.dispatch = layer.fmoe.spread(groups) if fastmoe else Dispatch(layer.num_experts, groups)
    ignore_experts_in_ddp(model)
    return model


def _keep_local_experts(layer: SMoE, groups: ParallelGroups) -> None:
    experts = layer.experts
    for name, parameter in list(experts.named_parameters(recurse=False)):
        local = groups.scatter_experts(_from_rank_0(parameter.data)).clone()
        setattr(experts, name, nn.Parameter(local, requires_grad=parameter.requires_grad))
    experts.num_experts = layer.num_experts // groups.expert_parallel


def _from_rank_0(tensor: Tensor) -> Tensor:
    """Rank 0's value of ``tensor``; ``tensor`` itself on the meta device, which has no values."""
    if tensor.is_meta:
        return tensor
    value = tensor.to(communication_device(tensor)).contiguous().clone()
    dist.broadcast(value, 0)
    return value.to(tensor.device)


def _check_plain_experts(where: str, layer: SMoE) -> None:
    """Raises a ValueError if the experts are wrapped: the tensors of an adapter have no dimension for the experts."""
    if not isinstance(layer.experts, Experts):
        raise ValueError(
            f"{type(layer.experts).__name__} wraps the experts of {where}; adapters on experts need "
            "expert_parallel = 1, or merge them first (model = model.merge_and_unload())"
        )


def parallelized_layers(model: nn.Module) -> list[tuple[str, SMoE]]:
    """(name, layer) of the SMoE layers that ``parallelize`` has made expert parallel.

    Raises:
        ValueError: PEFT has wrapped the experts of such a layer.
    """
    layers = [(name, layer) for name, layer in smoe_layers(model) if layer.dispatch is not None]
    for name, layer in layers:
        _check_plain_experts(f"layer {name}" if name else "the layer", layer)
    return layers


def expert_names(model: nn.Module) -> set[str]:
    """The names of the parameters of local experts."""
    return {
        f"{name}.experts.{parameter}" if name else f"experts.{parameter}"
        for name, layer in parallelized_layers(model)
        for parameter, _ in layer.experts.named_parameters()
    }


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the local experts of parallelized layers, each once."""
    unique = {id(p): p for _, layer in parallelized_layers(model) for p in layer.experts.parameters()}
    return list(unique.values())


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Makes DDP ignore the local experts when it wraps ``model``: they differ between the ranks.

    ``parallelize`` does it for its model. If DDP is to wrap a module around that model (a PeftModel, for example), call
    this for it first: DDP would overwrite the experts of all ranks with rank 0's.
    """
    names = expert_names(model)
    names |= {f"_orig_mod.{name}" for name in names}  # the names that torch.compile gives them
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))


def check_ddp(model: nn.Module) -> None:
    """Raises a ValueError if a DDP in ``model`` averages local experts, which differ between the ranks."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            averaged = sorted(expert_names(module.module) - module.parameters_to_ignore)
            if averaged:
                raise ValueError(
                    f"DDP averages {averaged[0]} over ranks that hold different experts; call "
                    "ignore_experts_in_ddp(module) before DistributedDataParallel(module)"
                )


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model
