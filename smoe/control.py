"""What is done to all SMoE layers of a model: set k, read it, and record how tokens are routed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from .experts import Experts
from .k_per_row import set_k_per_row
from .layer import SMoE
from .router import Router, Routing, check_top_k
from .wrappers import is_offloaded

T = TypeVar("T")


def smoe_layers(model: nn.Module) -> list[tuple[str, SMoE]]:
    """(name, layer) of every SMoE layer of ``model``, each once, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SMoE)]


def _layers_or_error(model: nn.Module) -> list[SMoE]:
    layers = [layer for _, layer in smoe_layers(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is no top_k to read or set")
    return layers


def check_whole(model: nn.Module, doing: str) -> None:
    """Raises a ValueError unless the router and all experts of every layer are here, for ``doing`` to read and replace.

    They are not if ``parallelize`` has spread the experts over ranks, PEFT has wrapped them, or accelerate has
    offloaded them.
    """
    for name, layer in smoe_layers(model):
        where = f"of layer {name or type(model).__name__}"
        if layer.dispatch is not None:
            raise ValueError(
                f"{doing}: the experts {where} are spread over ranks; do it before parallelize, or load the result of "
                "gather_state into a model that is not spread"
            )
        for part, module, kind in (("router", layer.router, Router), ("experts", layer.experts, Experts)):
            if not isinstance(module, kind):
                raise ValueError(
                    f"{doing}: {type(module).__name__} wraps the {part} {where}; do it before get_peft_model, or merge "
                    "the adapter first (model = model.merge_and_unload())"
                )
            if hasattr(module, "_hf_hook") and is_offloaded(module):
                raise ValueError(
                    f"{doing}: accelerate has offloaded the {part} {where}; call "
                    "accelerate.hooks.remove_hook_from_submodules(model) first"
                )


def one_per_layer(field: str, value: T | Sequence[T], count: int, there: str) -> list[T]:
    """``value`` for each of ``count`` layers, or the list that it is. A ValueError for one of another length; ``there``
    says how many layers there are."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{field} is {list(value)}, {len(value)} numbers; {there}, so it must be one number or {count}"
        )
    return list(value)


def set_top_k(model: nn.Module, k: int | Sequence[int]) -> None:
    """Sets the number of activated experts: one k for every SMoE layer, or one k per layer in the model's order.

    Raises:
        ValueError: the model has no SMoE layer, a list does not have one k per layer, or a k is not in 1..N of its
            layer. No layer is changed then.
    """
    layers = _layers_or_error(model)
    ks = one_per_layer("k", k, len(layers), f"{type(model).__name__} has {len(layers)} SMoE layers")
    for layer, layer_k in zip(layers, ks, strict=True):
        check_top_k(layer_k, layer.num_experts)
    for layer, layer_k in zip(layers, ks, strict=True):
        layer.top_k = layer_k


@contextmanager
def activated(model: nn.Module, k: int | Sequence[int] | Tensor | None) -> Iterator[None]:
    """Within the block the SMoE layers of ``model`` activate k experts; afterwards, also after an error, as before.

    Args:
        k: one for all layers, or one per layer (see ``set_top_k``); None leaves every layer at its own k. A tensor of
            whole numbers gives every row of the batch its own k, in all layers: (batch,), or (batch, length) for one
            per token. Every row gets the numbers that it would get alone, and the experts compute as many tokens as
            the sum of all k says. The model's inputs have the batch as their first dimension; ``layer.top_k`` is the
            largest k meanwhile (N where experts are spread over ranks).

    With activation checkpointing run ``backward`` within the block, because it computes layers again.

    Raises:
        ValueError: as ``set_top_k``; or k is a tensor and a layer can't have a k per row (engine ``fastmoe``, a router
            without it). No layer is changed then. A tensor that does not fit a layer's input is found in the pass.
    """
    before = [(layer, layer.top_k, layer.k_per_row) for _, layer in smoe_layers(model)]
    try:
        if isinstance(k, Tensor):
            set_k_per_row(_layers_or_error(model), k)
        elif k is not None:
            set_top_k(model, k)
        yield
    finally:
        for layer, top_k, k_per_row in before:
            layer.top_k, layer.k_per_row = top_k, k_per_row


def get_top_k(model: nn.Module) -> int | list[int]:
    """The number of activated experts: one number if all SMoE layers agree, else a list in the model's order."""
    ks = [layer.top_k for layer in _layers_or_error(model)]
    return ks[0] if len(set(ks)) == 1 else ks


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Within the block, every forward pass appends one :class:`Routing` per layer to the list that is yielded.

    Balance losses, votes and load plots come from it: ``sum(r.balance_loss for r in routings)``, or, where padding must
    not count, ``sum(smoe.balance_loss(r, mask) for r in routings)``. The model may be wrapped (DDP) or compiled, may
    run several passes, and blocks may be nested. Under activation checkpointing run ``backward`` after the block,
    because a pass that is recomputed within it is recorded again. With ``torch.nn.DataParallel`` the routings of the
    GPUs come in any order, each on its own GPU.
    """
    routings: list[Routing] = []
    # Each once: layers that share a router call it once per layer and pass.
    routers = {id(router): router for _, layer in smoe_layers(model) for router in layer.routers}.values()
    for router in routers:
        router.watch(routings)
    try:
        yield routings
    finally:
        for router in routers:
            router.unwatch(routings)
