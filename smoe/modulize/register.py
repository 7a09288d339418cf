"""MLPs that are described by hand, for those that can't be recognised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..activation import ACTIVATIONS, Activation, get_activation
from .linear import is_linear, widths
from .trial import Match, as_activation


@dataclass(frozen=True)
class Form:
    """Where the MLP in a module is; see :func:`register_mlp`."""

    up: str
    down: str
    gate: str | None
    fused: str | None
    activation: str | Callable[[Tensor], Tensor]
    dropout: str | float


_registered: dict[type[nn.Module], Form | None] = {}


def register_mlp(
    module_type: type[nn.Module],
    *,
    up: str | None = None,
    down: str | None = None,
    activation: str | Callable[[Tensor], Tensor] = "relu",
    gate: str | None = None,
    fused: str | None = None,
    dropout: str | float = 0.0,
    skip: bool = False,
) -> None:
    """Says where the MLP in modules of ``module_type`` is, for those that ``modulize`` can't recognise by itself.

    The module must compute ``down(dropout(activation(up(x))))``, with a gate
    ``down(dropout(activation(gate(x)) * up(x)))``; what surrounds this (norms, residuals, attention) doesn't matter.

    Args:
        up, down, gate: the names of its linear layers, from the module on (``"mlp.fc1"``).
        fused: where ``up`` holds gate and up in one layer: ``gate_first`` or ``gate_last``.
        activation: one of smoe's names (``relu``, ``gelu``, ``gelu_tanh``, ``silu``), an elementwise function, or the
            name of the attribute that holds one.
        dropout: the rate between the activation and ``down``, or the name of the attribute that holds it.
        skip: there is no MLP here; ``modulize`` leaves the module and all in it alone.

    Raises:
        ValueError: an argument is missing or not valid.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ValueError(f"module_type is {module_type!r}; it must be a class of nn.Module")
    if skip:
        _registered[module_type] = None
        return
    if not up or not down:
        raise ValueError(f"up is {up!r} and down is {down!r}; both must name a linear layer of {module_type.__name__}")
    if fused not in (None, "gate_first", "gate_last"):
        raise ValueError(f"fused is {fused!r}; it must be None, 'gate_first' or 'gate_last'")
    _registered[module_type] = Form(up, down, gate, fused, activation, dropout)


def is_registered(module: nn.Module) -> bool:
    return any(t in _registered for t in type(module).__mro__)


def form_of(module: nn.Module) -> Form | None:
    """What was registered for a module's class or the next class above; None means to skip it."""
    return next(_registered[t] for t in type(module).__mro__ if t in _registered)


def match_of(module: nn.Module, label: str, form: Form) -> Match:
    """The MLP of ``module`` by ``form``; errors call it ``label``."""

    def linear(field: str, path: str) -> nn.Module:
        try:
            part = module.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"{label}: register_mlp was given {field}={path!r}, but there is no such layer") from error
        if not is_linear(part):
            raise ValueError(f"{label}: {field}={path!r} is a {type(part).__name__}; it must be a linear layer")
        return part

    up, down = linear("up", form.up), linear("down", form.down)
    gate = None if form.gate is None else linear("gate", form.gate)
    (d, wide), (hidden, back) = widths(up), widths(down)
    if d != back or wide != (2 * hidden if form.fused else hidden) or (gate is not None and widths(gate) != (d, wide)):
        raise ValueError(f"{label}: up is {d} -> {wide} and down {hidden} -> {back}; they don't make an MLP")
    return Match(up, down, gate, form.fused, _activation(module, label, form), _rate(module, form))


def _activation(module: nn.Module, label: str, form: Form) -> Activation:
    function = form.activation
    if isinstance(function, str) and function not in ACTIVATIONS and hasattr(module, function):
        function = getattr(module, function)
    activation = get_activation(function) if isinstance(function, str) else as_activation(function)
    if activation is None:
        raise ValueError(f"{label}: activation={form.activation!r} is not an elementwise function")
    return activation


def _rate(module: nn.Module, form: Form) -> float:
    rate = getattr(module, form.dropout) if isinstance(form.dropout, str) else form.dropout
    return float(getattr(rate, "p", rate))
