"""``modulize`` and ``demodulize``: a model's MLPs become SMoE layers, in place, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..control import check_whole, smoe_layers
from ..experts import check_divisible
from ..layer import SMoE
from ..router import check_top_k
from .find import FoundMLP, find_mlps
from .hook import record_when_saving
from .layers import Layers, PerLayer, chosen_layers, per_layer
from .swap import Outlet, exchange, make_layer, restore, silence_fast_path, slots_of


def modulize(
    model: nn.Module,
    num_experts: PerLayer = 16,
    layers: Layers = "all",
    **layer_options: Any,
) -> nn.Module:
    """Cuts the MLPs of ``model`` into ``num_experts`` experts each, in place, and returns the model.

    The weights are kept: with ``score="sum"`` the model computes the same at k = N. MLPs are recognised by what they
    compute (see ``smoe.modulize.trial``), so this works for most transformers; ``smoe.register_mlp`` is for the rest.
    ``smoe.summary`` shows what was cut. Create the optimizer afterwards: the parameters are new.

    Args:
        num_experts: N; must divide the hidden width of every chosen MLP. One for all, or one per chosen MLP: a list in
            the model's order, or a mapping from their names, or parts of names that only one has
            (``{"layers.0": 16, "layers.1": 8}``).
        layers: which MLPs, in the model's order (an encoder's come before its decoder's): ``all``; ``early`` or
            ``later``, the first or last half; ``middle``, the half in between; ``every-2``, the 2nd, 4th, ...
            (Figure 5 (e)); or their indices from 0.
        layer_options: of :class:`SMoE`: ``top_k`` (one, or one per layer as ``num_experts``), ``router``, ``score``,
            ``output_scale``, ``seed`` (layer i draws its router from seed + i), ``compute``, ``engine``. Activation,
            biases, gate and dropout are the model's.

    Raises:
        ValueError: no MLP is recognised, one can't be read or is experts already, N does not divide a width, a list
            does not have one number per chosen MLP, an option is wrong, or the model has SMoE layers or a wrapper
            (DDP) already. Nothing is changed then.
    """
    layers_there = smoe_layers(model)
    if layers_there:
        made = any(isinstance(module, Outlet) for module in model.modules())
        first = "smoe.demodulize(model) comes first" if made else f"its own code builds them ({layers_there[0][0]})"
        raise ValueError(f"{type(model).__name__} has SMoE layers already; {first}")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(f"{name or 'the model'} is DDP, which can't follow new parameters; modulize what it wraps")
    _check_options(layer_options)
    found = find_mlps(model)
    chosen = [found[i] for i in chosen_layers(layers, len(found))]
    names = [mlp.name for mlp in chosen]
    options = [_seeded(layer_options, i) for i in range(len(chosen))]
    for option, value in (("num_experts", num_experts), ("top_k", layer_options.get("top_k"))):
        for of_layer, one in zip(options, per_layer(option, value, names), strict=True):
            of_layer[option] = one
    for mlp, of_layer in zip(chosen, options, strict=True):
        _check_fit(mlp, of_layer)
    place(model, [(mlp, partial(make_layer, mlp, o)) for mlp, o in zip(chosen, options, strict=True)])
    return model


def place(model: nn.Module, plan: list[tuple[FoundMLP, Callable[[], SMoE]]]) -> None:
    """Exchanges every MLP of ``plan`` for the SMoE layer that goes with it; all of them or, on an error, none.

    The layers are made one after the other: each time the MLP's own weights are freed.
    """
    slots = slots_of(model)
    done: list[Outlet] = []
    try:
        for found, make in plan:
            done.append(exchange(slots, found, make()))
    except BaseException:
        for outlet in done:
            restore(slots_of(model), outlet)
        raise
    silence_fast_path(model)
    record_when_saving()


def demodulize(model: nn.Module) -> nn.Module:
    """The exact inverse of :func:`modulize`, in place: the model's own linear layers, with the experts' weights.

    Keys, their order and classes are as before, and so are the numbers if nothing was trained in between. Slimmed
    layers come back as narrower MLPs. The dense MLP is the sum of all N experts, as the SMoE layer computes at k = N
    with ``score="sum"``; if a layer computes something else now, a warning says so.

    Raises:
        ValueError: the model has no SMoE layer that ``modulize`` made.
    """
    outlets = {name: module for name, module in model.named_modules() if isinstance(module, Outlet)}
    if not outlets:
        hint = "; adopt_layers of smoe.modulize.adopt puts its own into such a model" if smoe_layers(model) else ""
        raise ValueError(f"{type(model).__name__} has no SMoE layer that smoe.modulize made{hint}")
    check_whole(model, "demodulize")
    quantised = next((name for name, outlet in outlets.items() if outlet.mlp.experts.int8), None)
    if quantised is not None:
        raise ValueError(f"demodulize: the experts of {quantised} are int8; do it before to_int8")
    differing = {name: why for name, outlet in outlets.items() if (why := _unlike_dense(outlet.mlp))}
    if differing:
        name, why = next(iter(differing.items()))
        warnings.warn(
            f"the dense model will compute something else: {name} {why} ({len(differing)} of {len(outlets)} layers "
            "differ), but a dense MLP sums all its experts with weight 1; smoe.slim(model, votes, keep=k) makes k of "
            "them all there are",
            stacklevel=2,
        )
    for outlet in outlets.values():
        restore(slots_of(model), outlet)
    silence_fast_path(model)
    return model


def _unlike_dense(layer: SMoE) -> str | None:
    """What ``layer`` does that the sum of its experts does not."""
    if layer.top_k < layer.num_experts:
        return f"activates {layer.top_k} of {layer.num_experts} experts"
    if layer.router.score != "sum":
        return f"weighs its experts by score={layer.router.score!r}"
    return None if layer.scale == 1 else f"multiplies its output by {layer.scale}"


_OPTIONS = ("top_k", "router", "score", "output_scale", "seed", "compute", "engine")


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"{name} is no option of modulize; there are num_experts, layers, {', '.join(_OPTIONS)}")
    if options.get("router") == "hash":
        raise ValueError("router is 'hash'; its token ids don't reach the MLPs of a finished model; use another router")


def _seeded(options: dict[str, Any], i: int) -> dict[str, Any]:
    """A copy, for layer i."""
    return {**options, **({} if options.get("seed") is None else {"seed": options["seed"] + i})}


def _check_fit(found: FoundMLP, options: dict[str, Any]) -> None:
    try:
        check_divisible(found.d_hidden, options["num_experts"])
        if options["top_k"] is not None:
            check_top_k(options["top_k"], options["num_experts"])
    except ValueError as error:
        raise ValueError(f"{found.name}: {error}") from None
    with torch.device("meta"):  # whatever else is wrong shows here, before anything is changed
        SMoE(found.d_model, found.d_hidden, **options)
