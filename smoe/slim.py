"""Counting which experts the data chooses, and keeping those (the paper's "self-slimmable", section 4.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .control import check_whole, record_routing, smoe_layers
from .experts import Experts
from .layer import SMoE
from .modulize import note_on_config
from .router import HashRouter, Router

Votes = dict[str, Tensor]


@torch.no_grad()
def vote(model: nn.Module, batches: Iterable[Any]) -> Votes:
    """Counts how often each expert is chosen while ``model`` reads ``batches``, in evaluation mode, at its current k.

    Args:
        batches: the inputs, on the model's device: mappings (``model(**batch)``), tuples or lists
            (``model(*batch)``), or anything else (``model(batch)``). Padding tokens count too.

    Returns:
        For every SMoE layer, by name, (N,) int64 counts, which add up to tokens * k.

    Raises:
        ValueError: the model has no SMoE layer, or there was no batch.
    """
    layers = smoe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is nothing to vote for")
    full = [name for name, layer in layers if layer.top_k == layer.num_experts]
    if full:
        warnings.warn(
            f"{full[0]} activates all of its experts, so all get the same votes; call smoe.set_top_k(model, k) first",
            stacklevel=3,
        )
    votes = {name: torch.zeros(layer.num_experts, dtype=torch.int64) for name, layer in layers}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    seen = False
    try:
        for batch in batches:
            seen = True
            with ExitStack() as stack:
                routings = {name: stack.enter_context(record_routing(layer)) for name, layer in layers}
                _call(model, batch)
            for name, of_layer in routings.items():
                for routing in of_layer:
                    chosen = routing.indices.reshape(-1).cpu()
                    votes[name] += torch.bincount(chosen, minlength=votes[name].numel())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise ValueError("batches is empty; it must hold at least one batch")
    return votes


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


@torch.no_grad()
def slim(model: nn.Module, votes: Votes, keep: int = 8) -> nn.Module:
    """Keeps, in every SMoE layer, the ``keep`` experts with the most votes, in place, and returns the model.

    The other experts and their rows of the router are removed: the model is smaller, and N is ``keep``. Experts stay in
    their order; among equal votes the first ones are kept. Where k was larger than ``keep``, it becomes ``keep``. The
    parameters are new ones, so create the optimizer afterwards.

    Args:
        votes: from :func:`vote`, or (N,) numbers of your own for every layer.
        keep: the number of experts to keep per layer.

    Raises:
        ValueError: votes do not fit the model's layers, or keep is not in 1..N. Nothing is changed then.
    """
    layers = dict(smoe_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is nothing to slim")
    check_whole(model, "slim")
    if votes.keys() != layers.keys():
        odd = sorted(votes.keys() ^ layers.keys())
        raise ValueError(f"votes don't fit: {odd[0]!r} is only in the {'votes' if odd[0] in votes else 'model'}")
    for name, layer in layers.items():
        if tuple(votes[name].shape) != (layer.num_experts,):
            raise ValueError(
                f"the votes of {name} have shape {tuple(votes[name].shape)}; it must be ({layer.num_experts},)"
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= layer.num_experts:
            raise ValueError(f"keep is {keep!r}; it must be a whole number from 1 to {layer.num_experts}, N of {name}")
    for name, layer in layers.items():
        most = votes[name].argsort(descending=True, stable=True)[:keep]
        keep_experts(layer, most.sort().values)
    note_on_config(model)
    return model


@torch.no_grad()
def keep_experts(layer: SMoE, kept: Tensor) -> None:
    """Removes all experts of ``layer`` but ``kept`` (n,), which are numbered 0..n - 1 in that order."""
    kept = kept.to(layer.experts.up.device)
    count = kept.numel()
    experts, router = layer.experts, layer.router
    _keep_rows(experts, ("up", "down", "gate", "up_bias", "gate_bias", "down_bias"), kept)
    if isinstance(router, HashRouter):
        router.table = _keep_ids(router.table, kept)
    else:
        _keep_rows(router, ("weight", "bias"), kept)
    layer.d_hidden = count * experts.d_expert
    layer.num_experts = router.num_experts = experts.num_experts = count
    layer.top_k = min(layer.top_k, count)


def _keep_rows(module: Experts | Router, names: tuple[str, ...], kept: Tensor) -> None:
    for name in names:
        old = getattr(module, name, None)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(old[kept].clone(), requires_grad=old.requires_grad))
        elif old is not None:
            setattr(module, name, old[kept].clone())


def _keep_ids(table: Tensor, kept: Tensor) -> Tensor:
    """(V, N) orders of experts -> (V, n): the kept ones in the same order, by their new numbers."""
    number = torch.full((table.shape[1],), -1, dtype=table.dtype, device=table.device)
    number[kept] = torch.arange(kept.numel(), dtype=table.dtype, device=table.device)
    renumbered = number[table.long()]
    return renumbered[renumbered >= 0].view(table.shape[0], kept.numel())
