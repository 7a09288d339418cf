"""Every rank keeps its slice of the experts."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..control import smoe_layers
from ..layer import SMoE
from .dispatch import Dispatch
from .groups import ParallelGroups, communication_device


def parallelize(model: nn.Module, groups: ParallelGroups) -> nn.Module:
    """Spreads the experts of every SMoE layer of ``model`` over the ranks of ``groups``, in place, and returns it.

    Rank r of a group of E keeps experts ``r * N / E .. (r + 1) * N / E - 1``, as slices of rank 0's whole layer: names
    of parameters stay, their first dimension is N / E. Routers stay whole, and are made equal to rank 0's too. The
    layer's ``num_experts``, ``top_k``, ``record_routing`` and ``set_top_k`` work as before, with N and k.

    Call it on every rank, with the model built whole, before the optimizer, DDP and ``torch.compile``; the parameters
    are new ones. Count parameters and FLOPs, modulize and slim before it. With E = 1 nothing changes.

    Raises:
        ValueError: E does not divide the N of a layer, or the layer is spread already. Nothing is changed then.
    """
    layers = smoe_layers(model)
    size = groups.expert_parallel
    for name, layer in layers if size > 1 else ():
        where = f"layer {name}" if name else "the layer"
        if layer.num_experts % size:
            raise ValueError(f"{where} has {layer.num_experts} experts, which expert_parallel = {size} does not divide")
        if layer.dispatch is not None:
            raise ValueError(f"the experts of {where} are spread over ranks already; parallelize a model once")
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
                tensor.data.copy_(_from_main(tensor.data))
        if id(layer.experts) not in seen:  # layers may share their experts
            seen.add(id(layer.experts))
            _keep_slice(layer, groups)
        fastmoe = layer.engine == "fastmoe"
        layer.dispatch = layer.fmoe.spread(groups) if fastmoe else Dispatch(layer.num_experts, groups)
    ignore_experts_in_ddp(model)
    return model


def _keep_slice(layer: SMoE, groups: ParallelGroups) -> None:
    experts = layer.experts
    for name, parameter in list(experts.named_parameters(recurse=False)):
        mine = groups.scatter_experts(_from_main(parameter.data)).clone()
        setattr(experts, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))
    experts.num_experts = layer.num_experts // groups.expert_parallel


def _from_main(tensor: Tensor) -> Tensor:
    """Rank 0's value of ``tensor``; on the meta device there is none."""
    if tensor.is_meta:
        return tensor
    value = tensor.to(communication_device(tensor)).contiguous().clone()
    dist.broadcast(value, 0)
    return value.to(tensor.device)


def spread_layers(model: nn.Module) -> list[tuple[str, SMoE]]:
    """(name, layer) of the SMoE layers whose experts are spread over ranks."""
    return [(name, layer) for name, layer in smoe_layers(model) if layer.dispatch is not None]


def expert_names(model: nn.Module) -> set[str]:
    """Names of the parameters that hold a slice of a layer's experts."""
    return {
        f"{name}.experts.{parameter}" if name else f"experts.{parameter}"
        for name, layer in spread_layers(model)
        for parameter, _ in layer.experts.named_parameters()
    }


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Tells DDP, before it wraps ``model``, to leave the spread experts alone: ranks hold different ones.

    ``parallelize`` does it for the model it is given; call this again for a module around it, if DDP is to wrap that.
    """
    names = expert_names(model)
    names |= {f"_orig_mod.{name}" for name in names}  # what torch.compile makes of them
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))


def check_ddp(model: nn.Module) -> None:
    """A ValueError if a DDP in ``model`` averages the spread experts, which would mix different ones up."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            mixed = sorted(expert_names(module.module) - module.parameters_to_ignore)
            if mixed:
                raise ValueError(
                    f"DDP averages {mixed[0]}, a spread expert; call ignore_experts_in_ddp(its module) before wrapping"
                )


def bare(model: nn.Module) -> nn.Module:
    """The model that DDP or torch.compile wraps."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that hold a slice of a layer's experts, each once."""
    unique = {id(p): p for _, layer in spread_layers(model) for p in layer.experts.parameters()}
    return list(unique.values())
