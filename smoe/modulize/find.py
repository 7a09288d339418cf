"""Finding a model's MLPs: by how its linear layers fit together, then by trying out what is between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..activation import ACTIVATIONS, Activation, get_activation
from .linear import is_linear, widths
from .trial import Match, activations_of, as_activation, trial

DEPTH = 3  # how far below their common module the two linear layers of an MLP may be


@dataclass(frozen=True)
class FoundMLP:
    """One MLP of a model. Its linear layers take ``(..., d_model)`` to d_hidden units and back.

    name: of ``down`` in the model. The rest is :class:`smoe.modulize.trial.Match`.
    """

    name: str
    match: Match

    @property
    def d_model(self) -> int:
        return widths(self.match.down)[1]

    @property
    def d_hidden(self) -> int:
        return widths(self.match.down)[0]


@dataclass(frozen=True)
class _Registered:
    up: str
    down: str
    gate: str | None
    fused: str | None
    activation: str | Callable[[Tensor], Tensor]
    dropout: str | float


_registered: dict[type[nn.Module], _Registered | None] = {}


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
    """Says where the MLP in modules of ``module_type`` is, for those that ``modulize`` can't make out by itself.

    The module must compute ``down(dropout(activation(up(x))))``, with a gate
    ``down(dropout(activation(gate(x)) * up(x)))``; what surrounds this (norms, residuals, attention) doesn't matter.

    Args:
        up, down, gate: the names of its linear layers, from the module on (``"mlp.fc1"``).
        fused: where ``up`` holds gate and up in one layer: ``gate_first`` or ``gate_last``.
        activation: a name of ``smoe``'s, an elementwise function, or the name of the attribute that holds one.
        dropout: the rate between the activation and ``down``, or the name of the attribute that holds it.
        skip: this is no MLP; ``modulize`` leaves it alone.
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
    _registered[module_type] = _Registered(up, down, gate, fused, activation, dropout)


def find_mlps(model: nn.Module) -> list[FoundMLP]:
    """The MLPs of ``model``, in the model's own order, each once.

    Raises:
        ValueError: it has none, or has modules that look like MLPs but compute something else; they are named.
    """
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    order = {module: i for i, module in enumerate(model.modules())}
    found: list[Match] = []
    unknown: list[str] = []
    looked_at: list[str] = []
    taken: set[nn.Module] = set()
    labels = {module: f"{name or 'the model itself'} ({type(module).__name__})" for module, name in names.items()}
    for scope, label in labels.items():
        known = next((t for t in type(scope).__mro__ if t in _registered), None)
        if known is not None:
            form = _registered[known]
            found += [] if form is None else [_by_registration(scope, label, form)]
            taken |= set(scope.modules()) if form is None else _linears_of(found[-1])
    for scope in sorted(order, key=lambda module: (-names[module].count("."), order[module])):
        label = labels[scope]
        ups, downs = _candidates(scope, taken)
        if not ups:
            continue
        looked_at.append(label)
        matches, reason = trial(scope, ups, downs)
        for match in matches:
            if not taken & _linears_of(match):
                found.append(match)
                taken |= _linears_of(match)
        above_others = bool(taken & set(scope.modules()))
        if not matches and not above_others and _looks_like_an_mlp(scope, ups + downs):
            unknown.append(f"{label}: {reason}")
    unknown += _sharing_weights(model, found, names)
    if unknown:
        raise ValueError(
            "these look like MLPs, but can't be cut into experts: " + _listed(unknown) + "; smoe.register_mlp(...) "
            "says how to read such a module, or with skip=True that it is to be left alone; nothing was changed"
        )
    if not found:
        looked = looked_at or [labels[m] for m in order if is_linear(m)]
        what = _listed(looked) if looked else "no linear layer at all"
        raise ValueError(f"{type(model).__name__} has no MLP that smoe knows; looked at: {what}; see smoe.register_mlp")
    found.sort(key=lambda match: order[match.up])
    return [FoundMLP(names[match.down], match) for match in found]


def _listed(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _linears_of(match: Match) -> set[nn.Module]:
    return {m for m in (match.up, match.down, match.gate) if m is not None}


def _candidates(scope: nn.Module, taken: set[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """(widening, narrowing) linear layers below ``scope`` that could make an MLP with ``scope`` as its smallest home.

    An MLP's first layer is d -> H (or 2H), its second H -> d, H > d, and they hang from different children.
    """
    if isinstance(scope, (nn.ModuleList, nn.ModuleDict)):
        return [], []  # can't be called; its parent can
    placed: list[tuple[nn.Module, nn.Module]] = []  # (child of scope it hangs from, linear)
    for child in scope.children():
        branches = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
        for branch in branches:
            placed += [(branch, m) for m in _linears_below(branch, DEPTH - 1) if m not in taken]
    ups, downs = {}, {}
    for up_branch, up in placed:
        for down_branch, down in placed:
            (d, wide), (hidden, back) = widths(up), widths(down)
            fits = d == back and d < hidden and wide in (hidden, 2 * hidden)
            # Two blocks of one kind side by side are a stack of layers, not the halves of an MLP.
            stacked = up_branch is not up and type(up_branch) is type(down_branch)
            if fits and up_branch is not down_branch and not stacked:
                ups[up] = downs[down] = True
    return list(ups), list(downs)


def _linears_below(module: nn.Module, depth: int) -> list[nn.Module]:
    if is_linear(module):
        return [module]
    return [m for child in module.children() for m in _linears_below(child, depth - 1)] if depth > 0 else []


def _looks_like_an_mlp(scope: nn.Module, linears: list[nn.Module]) -> bool:
    """Whether to name it to the user: an activation is near, or it is no attention, whose q, k and v read its input."""
    near = [scope, *(m for m in scope.modules() if any(child in linears for child in m.children()))]
    d_model = widths(linears[0])[0]
    readers = [m for m in scope.modules() if is_linear(m) and widths(m)[0] == d_model]
    return bool(activations_of(near)) or len(readers) < 3


def _by_registration(scope: nn.Module, label: str, form: _Registered) -> Match:
    def linear(field: str, path: str) -> nn.Module:
        try:
            module = scope.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"{label}: register_mlp was given {field}={path!r}, but there is no such layer") from error
        if not is_linear(module):
            raise ValueError(f"{label}: {field}={path!r} is a {type(module).__name__}; it must be a linear layer")
        return module

    up, down = linear("up", form.up), linear("down", form.down)
    gate = None if form.gate is None else linear("gate", form.gate)
    (d, wide), (hidden, back) = widths(up), widths(down)
    if d != back or wide != (2 * hidden if form.fused else hidden) or (gate is not None and widths(gate) != (d, wide)):
        raise ValueError(f"{label}: up is {d} -> {wide} and down {hidden} -> {back}; they don't make an MLP")
    return Match(up, down, gate, form.fused, _registered_activation(scope, label, form), _registered_rate(scope, form))


def _registered_activation(scope: nn.Module, label: str, form: _Registered) -> Activation:
    function = form.activation
    if isinstance(function, str) and function not in ACTIVATIONS and hasattr(scope, function):
        function = getattr(scope, function)
    activation = get_activation(function) if isinstance(function, str) else as_activation(function)
    if activation is None:
        raise ValueError(f"{label}: activation={form.activation!r} is not an elementwise function")
    return activation


def _registered_rate(scope: nn.Module, form: _Registered) -> float:
    rate = getattr(scope, form.dropout) if isinstance(form.dropout, str) else form.dropout
    return float(getattr(rate, "p", rate))


def _sharing_weights(model: nn.Module, found: list[Match], names: dict[nn.Module, str]) -> list[str]:
    """MLPs whose parameters another module holds too: cut into experts they would part from it."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    return [
        f"{names[linear]} ({type(linear).__name__}): {other} shares its weight"
        for match in found
        for linear in (match.up, match.gate, match.down)
        if linear is not None
        for other in {names[h] for p in linear.parameters() for h in holders[id(p)] if h is not linear}
    ]
