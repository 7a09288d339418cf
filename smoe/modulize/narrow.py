"""Making one layer smaller: an SMoE layer by whole experts, a dense MLP by hidden units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..experts import Experts
from ..layer import SMoE
from ..router import HashRouter, Router
from .find import FoundMLP
from .linear import set_weight, weight_of


@torch.no_grad()
def keep_experts(layer: SMoE, kept: Tensor) -> None:
    """Removes all experts of ``layer`` but ``kept`` (n,), which are numbered 0..n - 1 in that order."""
    kept = kept.to(layer.experts.up.device)
    before, count = layer.num_experts, kept.numel()
    experts, router = layer.experts, layer.router
    if layer.output_scale == "num_experts" and count != before:
        layer.output_scale = before  # the experts were trained with it
    # Layers may share a router or experts, which must be cut once.
    if experts.num_experts == before:
        _keep_rows(experts, ("up", "down", "gate", "up_bias", "gate_bias", "down_bias"), kept)
    if router.num_experts == before:
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


@torch.no_grad()
def narrow_mlp(found: FoundMLP, width: int) -> None:
    """Makes a dense MLP ``width`` units wide, with the first of its units."""
    match = found.match
    for linear in linears(found):
        weight, bias = weight_of(linear), linear.bias
        if linear is match.down:
            weight = weight[:, :width]
        else:
            units = units_of(found, linear, width)
            weight, bias = weight[:units], None if bias is None else bias[:units]
        set_weight(linear, weight.clone(), None if bias is None else bias.clone())
    match.down.smoe_width = width  # for saving: the model's config has the old width


def linears(found: FoundMLP) -> list[nn.Module]:
    """The linear layers of an MLP."""
    match = found.match
    return [linear for linear in (match.up, match.gate, match.down) if linear is not None]


def units_of(found: FoundMLP, linear: nn.Module, width: int) -> int:
    """How many hidden units ``linear`` has in an MLP of this hidden width."""
    return 2 * width if linear is found.match.up and found.match.fused else width
