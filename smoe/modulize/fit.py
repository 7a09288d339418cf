"""Whether saved tensors fit a model, and where each of them goes: found out before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..control import smoe_layers
from ..layer import SMoE
from ..router import CLASSES, ROUTERS
from .find import FoundMLP, find_mlps
from .folder import Header, brief
from .hook import is_transformers_model
from .linear import is_transposed
from .narrow import linears, units_of
from .record import Record, plain_name, router_kind
from .swap import Outlet, empty_layer


class Slot(NamedTuple):
    """A tensor that the model will have. Slots of one ``identity`` are one tensor under several names (tied)."""

    identity: Any
    shape: tuple[int, ...]
    floating: bool
    of_experts: bool = False


@dataclass
class Fit:
    """What loading does to ``model``.

    layers: MLPs to exchange for SMoE layers, with the options of these. placed: SMoE layers of the model's own code,
    with the options to set. narrowed: dense MLPs, with the hidden widths to give them.
    slots: the tensors that the model will have, by name. sources: name in the model -> name in the files.
    whole: whether all tensors must be used and all slots filled.
    """

    model: nn.Module
    layers: list[tuple[FoundMLP, dict[str, Any]]] = field(default_factory=list)
    placed: list[tuple[SMoE, dict[str, Any]]] = field(default_factory=list)
    narrowed: list[tuple[FoundMLP, int]] = field(default_factory=list)
    slots: dict[str, Slot] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    whole: bool = True

    def num_experts(self) -> list[int]:
        """N of every SMoE layer that the model will have."""
        changed = {id(layer) for layer, _ in self.placed}
        as_built = [layer.num_experts for _, layer in smoe_layers(self.model) if id(layer) not in changed]
        return [options["num_experts"] for _, options in (*self.layers, *self.placed)] + as_built

    def missing(self) -> list[str]:
        """The slots that no tensor fills, one name for each."""
        filled = {self.slots[name].identity for name in self.sources}
        return list({s.identity: name for name, s in self.slots.items() if s.identity not in filled}.values())

    def unused(self, saved: Mapping[str, Header]) -> list[str]:
        """The saved tensors that have no place in the model."""
        return sorted(saved.keys() - set(self.sources.values()))

    def check(self, saved: Mapping[str, Header], what: str) -> None:
        """A ValueError that begins with ``what`` if the saved tensors don't fit."""
        what = f"{what} don't fit {type(self.model).__name__}"
        missing, unused = self.missing(), self.unused(saved)
        if not self.whole:
            missing, unused = [name for name in missing if self.slots[name].of_experts], []
        problems = [
            f"{len(names)} {kind} ({listed(names)})"
            for kind, names in (("are missing", missing), ("have no place in it", unused))
            if names
        ]
        for name, source in self.sources.items():
            slot, header = self.slots[name], saved[source]
            if header.shape != slot.shape:
                problems.append(f"{brief(source)} has shape {header.shape}, it must be {slot.shape}")
            elif slot.floating and header.dtype is None:
                problems.append(f"{brief(source)} holds no floating-point numbers")
        if problems:
            raise ValueError(f"{what}: " + "; ".join(problems[:4]))


def fit_whole(model: nn.Module, record: Record, saved: Mapping[str, Header]) -> Fit:
    """How ``record`` and all ``saved`` tensors fit ``model``, the dense one that they were saved from."""
    fit = Fit(model)
    _check_experts(record, saved)
    found = _found(model, record.layers or record.widths)
    for name in (*record.layers, *record.widths):
        if name not in found:
            raise ValueError(
                f"the record has an MLP at {brief(name)}, but {type(model).__name__} has them at {listed(found)}"
            )
    fit.layers = [(found[name], options) for name, options in record.layers.items()]
    fit.narrowed = [(found[name], width) for name, width in record.widths.items()]
    by_hand = {plain_name(name): layer for name, layer in smoe_layers(model)}
    for name, options in record.placed.items():
        if name not in by_hand:
            raise ValueError(
                f"the record has an SMoE layer at {brief(name)}, but {type(model).__name__} has them at "
                f"{listed(by_hand) or 'no place'}"
            )
        layer = by_hand[name]
        if router_kind(layer) != options["router"]:
            raise ValueError(
                f"{name} has the router {router_kind(layer)!r}; it must be {options['router']!r}, as it was saved"
            )
        if layer.num_experts < options["num_experts"]:
            raise ValueError(f"{name} has {layer.num_experts} experts; it must have {options['num_experts']} or more")
        fit.placed.append((layer, options))
    for name, options in record.layers.items():
        if options["router"] not in ROUTERS or CLASSES[options["router"]].needs_token_ids:
            raise ValueError(f"the record has a router {options['router']!r} at {brief(name)}; modulize can't build it")
    fit.slots = _slots(fit)
    fit.sources = {name: name for name in fit.slots if name in saved}
    return fit


def fit_parts(model: nn.Module, record: Record, saved: Mapping[str, Header], base: str) -> Fit:
    """How much of a saved Transformers model fits ``model``, one of another class.

    Its base (the encoder of a masked language model) goes wherever ``model`` has a Transformers model with the same
    MLPs: under a new head, or as both halves of an encoder-decoder. Other tensors go where names and shapes agree.

    Args:
        base: the name of the base in the saved model's class (``bert``).
    """
    fit = Fit(model, whole=False)
    _check_experts(record, saved)
    source = f"{base}." if any(name.startswith(f"{base}.") for name in saved) else ""
    found = _found(model, True)
    parts: list[str] = []
    for name, module in model.named_modules():
        prefix = plain_name(f"{name}.") if name else ""
        if not is_transformers_model(module) or any(prefix.startswith(part) for part in parts):
            continue
        inside = [mlp.removeprefix(prefix) for mlp in found if mlp.startswith(prefix)]
        known = record.layers.keys() | record.widths.keys()
        if any(source + mlp in known or f"{source}{mlp}.weight" in saved for mlp in inside):
            parts.append(prefix)
    if not parts:
        raise ValueError(f"{type(model).__name__} has no part with the MLPs that were saved; it has {listed(found)}")
    for mlp in found:
        prefix = next((part for part in parts if mlp.startswith(part)), None)
        saved_name = None if prefix is None else source + mlp.removeprefix(prefix)
        if saved_name in record.layers:
            fit.layers.append((found[mlp], record.layers[saved_name]))
        elif saved_name in record.widths:
            fit.narrowed.append((found[mlp], record.widths[saved_name]))
    fit.slots = _slots(fit)
    for name, slot in fit.slots.items():
        prefix = next((part for part in parts if name.startswith(part)), None)
        if prefix is not None:
            if source + name.removeprefix(prefix) in saved:
                fit.sources[name] = source + name.removeprefix(prefix)
            continue
        for part in parts:  # what stands beside a base is its head
            outside = part.removesuffix(source)
            head = name.removeprefix(outside)
            if source and part.endswith(source) and name.startswith(outside) and head in saved:
                if saved[head].shape == slot.shape:
                    fit.sources[name] = head
    return fit


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(map(brief, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_experts(record: Record, saved: Mapping[str, Header]) -> None:
    """A ValueError where the record gives a layer other experts than are saved, before any of its size are made."""
    places = {f"{name}.mlp.": options for name, options in record.layers.items()}
    places |= {f"{name}.".lstrip("."): options for name, options in record.placed.items()}
    for prefix, options in places.items():
        name, num_experts = f"{prefix}experts.up", options["num_experts"]
        if name not in saved:
            raise ValueError(f"the record has experts at {brief(prefix)}, but no weight is called {brief(name)}")
        shape, wanted = saved[name].shape, (num_experts, options["d_hidden"] // num_experts)
        if shape[:2] != wanted:
            raise ValueError(f"{brief(name)} has shape {shape}; by the record it must begin with {wanted}")


def _found(model: nn.Module, needed: Any) -> dict[str, FoundMLP]:
    if not needed:
        return {}
    if any(isinstance(module, Outlet) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is modulized already; pass it dense, as it was before smoe.modulize")
    return {plain_name(mlp.name): mlp for mlp in find_mlps(model)}


def _slots(fit: Fit) -> dict[str, Slot]:
    """The state dict of ``fit.model`` once it is changed, by plain names."""
    owners: dict[int, list[str]] = {}
    slots: dict[str, Slot] = {}
    for name, value in fit.model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            name = plain_name(name)
            owners.setdefault(id(value), []).append(name)
            slots[name] = Slot(id(value), tuple(value.shape), value.is_floating_point())
    for found, options in fit.layers:
        for linear in linears(found):
            for parameter in linear.parameters():
                for name in owners[id(parameter)]:
                    del slots[name]
        shell = empty_layer(found, options, "meta").state_dict()
        for weight in owners[id(found.match.down.weight)]:
            for part, value in shell.items():
                name = f"{weight.removesuffix('weight')}mlp.{part}"
                slots[name] = Slot((found.name, part), tuple(value.shape), value.is_floating_point(), True)
    for layer, options in fit.placed:
        for part, value in layer.state_dict(keep_vars=True).items():
            shape = list(value.shape)
            shape[1 if part == "router.table" else 0] = options["num_experts"]
            for name in owners[id(value)]:
                slots[name] = slots[name]._replace(shape=tuple(shape))
    for found, width in fit.narrowed:
        for linear in linears(found):
            for part, parameter in linear.named_parameters():
                shape, is_down = list(parameter.shape), linear is found.match.down
                if part == "weight":
                    shape[int(is_down != is_transposed(linear))] = units_of(found, linear, width)
                elif not is_down:
                    shape[0] = units_of(found, linear, width)
                for name in owners[id(parameter)]:
                    slots[name] = slots[name]._replace(shape=tuple(shape))
    return slots
