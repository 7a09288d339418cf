"""Exchanging one MLP's linear layers for an SMoE layer, and back.

Only the linear layers of an MLP are exchanged. In place of the last stands an :class:`Outlet`, which holds the SMoE
layer; in place of the first (and of the gate) an :class:`Inlet`, which hands the outlet the MLP's input. The model's
own activation and dropout between them run on a placeholder that nobody reads: the SMoE layer has both inside. So
residuals, norms, chunking and checkpointing around an MLP work as before, whoever wrote the model.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..cut import merge, split
from ..experts import Experts
from ..layer import SMoE
from ..wrappers import unwrap
from .find import FoundMLP
from .linear import set_weight, weight_of


class _Channel:
    """Carries the input of an MLP from its inlet to its outlet, separately for each thread (``nn.DataParallel``)."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def put(self, x: Tensor) -> None:
        self._held[self._key()] = x

    def take(self) -> Tensor:
        x = self._held.pop(self._key(), None)
        if x is None:
            raise RuntimeError("the last linear layer of this MLP was called, but its first was not")
        return x

    @staticmethod
    def _key() -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()

    def __reduce__(self) -> tuple:
        return _Channel, ()  # copies start empty


class Inlet(nn.Module):
    """Stands in place of a widening linear layer: ``(..., d) -> (..., 1)``, or 2 where it held gate and up.

    The input goes to the outlet. The placeholder that it returns only keeps the model's code in between running.
    """

    def __init__(self, dense: nn.Module, channel: _Channel, width: int, mlp: nn.Module) -> None:
        super().__init__()
        self._dense, self._channel, self._width = (dense,), channel, width
        self._mlp = (mlp,)  # in a tuple: it is the outlet's submodule

    @property
    def weight(self) -> Tensor:
        """For models that look at their first linear layer: its dtype, or whether it is initialised (T5)."""
        return unwrap(self._mlp[0].experts, Experts)[0].up

    @property
    def bias(self) -> Tensor | None:
        return unwrap(self._mlp[0].experts, Experts)[0].up_bias

    def forward(self, x: Tensor) -> Tensor:
        self._channel.put(x)
        return x.new_zeros(*x.shape[:-1], self._width)

    def extra_repr(self) -> str:
        return f"was {self._dense[0]}"


class Outlet(nn.Module):
    """Stands in place of the narrowing linear layer: the SMoE layer, ``(..., d) -> (..., d)``, on its inlet's input.

    The output has the dtype of ``hidden``, as the linear layer's had: some models widen the hidden units before their
    last layer, because its output overflows in float16 (T5).
    """

    def __init__(self, found: FoundMLP, channel: _Channel, mlp: nn.Module) -> None:
        super().__init__()
        match = found.match
        self.mlp = mlp
        self._dense, self._channel, self.fused = (match.up, match.gate, match.down), channel, match.fused

    @property
    def weight(self) -> Tensor:
        """For models that look at their last linear layer: its dtype, or whether it is initialised (T5)."""
        return unwrap(self.mlp.experts, Experts)[0].down

    @property
    def bias(self) -> Tensor | None:
        return unwrap(self.mlp.experts, Experts)[0].down_bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(f"{prefix}weight", None)  # one of hook.wrong_weights
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self._channel.take().to(hidden.dtype))


def make_layer(found: FoundMLP, options: dict[str, Any]) -> SMoE:
    """The SMoE layer that holds the weights of an MLP. ``options`` of :class:`SMoE` replace what the MLP has."""
    layer = empty_layer(found, {"d_hidden": found.d_hidden, **options})
    split(layer.experts, _read(found))
    return layer


def empty_layer(found: FoundMLP, options: dict[str, Any], device: torch.device | str | None = None) -> SMoE:
    """An SMoE layer with the parameters, dtypes and activation that an MLP needs; its weights are drawn at random.

    options: of :class:`SMoE`, ``d_hidden`` among them. device: None is that of the MLP.
    """
    match, dense = found.match, _read(found)
    options = {"gated": match.gate is not None or match.fused is not None, "dropout": match.dropout, **options}
    with torch.device(match.up.weight.device if device is None else device):
        layer = SMoE(found.d_model, activation=match.activation, **options)
    experts = layer.experts
    for name in ("up", "gate", "down"):
        for source, target in (
            (dense.get(f"{name}_weight"), getattr(experts, name)),
            (dense.get(f"{name}_bias"), getattr(experts, f"{name}_bias")),
        ):
            if source is not None:
                target.data = target.data.to(source.dtype)
                target.requires_grad_(source.requires_grad)
    for name in ("up_bias", "gate_bias", "down_bias"):
        if name not in dense:
            setattr(experts, name, None)  # a bias that the model lacks would be trained, then lost
    layer.train(match.down.training)
    return layer


def _read(found: FoundMLP) -> dict[str, Tensor]:
    """The MLP's weights as :func:`smoe.split` takes them."""
    match = found.match
    dense: dict[str, Tensor] = {}
    for name, linear in (("up", match.up), ("gate", match.gate), ("down", match.down)):
        if linear is None:
            continue
        weight = weight_of(linear)
        parts = {name: (weight, linear.bias)}
        if name == "up" and match.fused:
            halves = weight.chunk(2), (None, None) if linear.bias is None else linear.bias.chunk(2)
            order = ("gate", "up") if match.fused == "gate_first" else ("up", "gate")
            parts = {part: (halves[0][i], halves[1][i]) for i, part in enumerate(order)}
        for part, (w, b) in parts.items():
            dense[f"{part}_weight"] = w
            if b is not None:
                dense[f"{part}_bias"] = b
    return dense


Slots = dict[nn.Module, list[tuple[nn.Module, str]]]


def slots_of(model: nn.Module) -> Slots:
    """Every place where a module stands, as (parent, name); a shared module has several."""
    slots: Slots = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                slots.setdefault(child, []).append((parent, name))
    return slots


def _put(slots: Slots, old: nn.Module, new: nn.Module) -> None:
    for parent, name in slots[old]:
        parent._modules[name] = new  # keeps the order of names, which setattr on a container may not


def exchange(slots: Slots, found: FoundMLP, layer: SMoE) -> Outlet:
    """Puts ``layer`` in place of the MLP's linear layers, which lose their weights."""
    match, channel = found.match, _Channel()
    outlet = Outlet(found, channel, layer)
    _put(slots, match.up, Inlet(match.up, channel, 2 if match.fused else 1, layer))
    if match.gate is not None:
        _put(slots, match.gate, Inlet(match.gate, channel, 1, layer))
    _put(slots, match.down, outlet)
    for linear in (match.up, match.gate, match.down):
        for name, parameter in [] if linear is None else list(linear.named_parameters()):
            # The linear layer is kept for the way back, its memory is not.
            setattr(linear, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
    return outlet


def restore(slots: Slots, outlet: Outlet) -> None:
    """Puts the MLP's linear layers back in place of ``outlet``, with the weights of its experts."""
    up, gate, down = outlet._dense
    experts = outlet.mlp.experts
    dense = merge(experts)
    if outlet.fused:
        order = ("gate", "up") if outlet.fused == "gate_first" else ("up", "gate")
        for kind in ("weight", "bias"):
            parts = [dense.pop(f"{name}_{kind}", None) for name in order]
            if parts[0] is not None:
                dense[f"up_{kind}"] = torch.cat(parts)
    slimmed = down.weight.numel() != dense["down_weight"].numel()
    for name, linear in (("up", up), ("gate", gate), ("down", down)):
        if linear is None:
            continue
        linear.weight.requires_grad_(getattr(experts, name).requires_grad)
        if linear.bias is not None:
            linear.bias.requires_grad_(getattr(experts, f"{name}_bias").requires_grad)
        set_weight(linear, dense[f"{name}_weight"], dense.get(f"{name}_bias"))
        linear.train(outlet.training)
    if slimmed:
        down.smoe_width = experts.num_experts * experts.d_expert  # for saving: the model's config has the old width
    for module in [m for m in slots if isinstance(m, Inlet) and m._channel is outlet._channel]:
        _put(slots, module, module._dense[0])
    _put(slots, outlet, down)


def silence_fast_path(model: nn.Module) -> None:
    """Switches off PyTorch's fused encoder kernel where an MLP is experts, and on again where it is dense.

    In evaluation ``nn.TransformerEncoderLayer`` hands its weights to that kernel without calling its linear layers.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if isinstance(module.linear2, Outlet):
                if "smoe_fast_path" in vars(module):
                    continue
                module.smoe_fast_path = module.activation_relu_or_gelu
                module.activation_relu_or_gelu = 0
            elif "smoe_fast_path" in vars(module):
                module.activation_relu_or_gelu = vars(module).pop("smoe_fast_path")
        elif isinstance(module, nn.TransformerEncoder):
            # The stack packs padded batches for that kernel alone.
            if any(isinstance(getattr(layer, "linear2", None), Outlet) for layer in module.layers):
                if "smoe_nested" in vars(module):
                    continue
                module.smoe_nested = getattr(module, "use_nested_tensor", False)
                module.use_nested_tensor = False
            elif "smoe_nested" in vars(module):
                module.use_nested_tensor = vars(module).pop("smoe_nested")
