"""Finding a model's MLPs: by how its linear layers fit together, then by trying out what is between them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..layer import SMoE
from .linear import is_like_linear, is_linear, widths
from .register import form_of, is_registered, match_of
from .trial import Match, activations_of, trial

DEPTH = 3  # how far below their common module the two linear layers of an MLP may be


@dataclass(frozen=True)
class FoundMLP:
    """One MLP of a model. Its linear layers take ``(..., d_model)`` to d_hidden units and back.

    name: of ``down`` in the model. match: how it computes.
    """

    name: str
    match: Match

    @property
    def d_model(self) -> int:
        return widths(self.match.down)[1]

    @property
    def d_hidden(self) -> int:
        return widths(self.match.down)[0]


@dataclass
class Survey:
    """What there is in a model.

    found: its MLPs, in the model's order. refused: (label, reason) of what looks like an MLP but can't be cut.
    skipped: labels of what ``register_mlp`` says to skip. narrow: MLPs with fewer hidden units than the model is wide
    (adapters, bottlenecks), which stay as they are. looked_at: labels of the modules that were tried out.
    """

    found: list[FoundMLP] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    narrow: list[FoundMLP] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)


def find_mlps(model: nn.Module) -> list[FoundMLP]:
    """The MLPs of ``model``, in the model's own order, each once.

    Raises:
        ValueError: it has none, or has modules that look like MLPs but compute something else or are experts already;
            they are named.
    """
    survey = survey_mlps(model)
    if survey.refused:
        raise ValueError(
            "these look like MLPs, but can't be cut into experts: "
            + _listed(f"{label}: {reason}" for label, reason in survey.refused)
            + "; smoe.register_mlp(...) says how to read such a module, or with skip=True that it is to be left alone; "
            "nothing was changed"
        )
    if not survey.found:
        looked = survey.looked_at or [_label(name, m) for name, m in model.named_modules() if is_linear(m)]
        what = _listed(looked) if looked else "no linear layer at all"
        raise ValueError(f"{type(model).__name__} has no MLP that smoe knows; looked at: {what}; see smoe.register_mlp")
    return survey.found


def survey_mlps(model: nn.Module, narrow: bool = False) -> Survey:
    """Looks through ``model``, which may have SMoE layers already. Narrow MLPs are found only if asked for."""
    return _Search(model).survey(narrow)


class _Search:
    """One look through a model.

    taken: modules that are settled. homes: the MLPs found, and the module that each was found in by trying it out
    (None: it was registered).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in reversed(list(model.named_modules()))}
        self.order = {module: i for i, module in enumerate(model.modules())}
        self.labels = {module: _label(name, module) for module, name in self.names.items()}
        layers = [module for module in model.modules() if isinstance(module, SMoE)]
        self.taken = {part for layer in layers for part in layer.modules()}
        self.homes: dict[Match, nn.Module | None] = {}
        self.result = Survey()

    def survey(self, narrow: bool) -> Survey:
        for scope, label in self.labels.items():
            if is_registered(scope):
                self._take_registered(scope, label)
        for scope in self.order:
            experts = 0 if scope in self.taken else _stacked_experts(scope)
            if experts:
                self._refuse(scope, f"it holds {experts} experts already")
                self.taken |= set(scope.modules())
        deepest_first = sorted(self.order, key=lambda module: (-self.names[module].count("."), self.order[module]))
        for scope in deepest_first:
            self._look_at(scope)
        for scope in deepest_first:  # afterwards, since attention is full of linear layers d -> d
            self._try_quietly(scope, "equal")
        self._refuse_lists_of_experts()
        self._refuse_shared_weights()
        self.result.found = self._in_order(self.homes)
        if narrow:
            wide, self.homes = self.homes, {}
            for scope in deepest_first:
                self._try_quietly(scope, "narrow")
            self.result.narrow, self.homes = self._in_order(self.homes), wide
        return self.result

    def _take_registered(self, scope: nn.Module, label: str) -> None:
        form = form_of(scope)
        if form is None:
            self.result.skipped.append(label)
            self.taken |= set(scope.modules())
            return
        match = match_of(scope, label, form)
        self.homes[match] = None
        self.taken |= _linears_of(match)

    def _look_at(self, scope: nn.Module) -> None:
        """Takes the MLPs that ``scope`` computes; refuses it if it looks like one and is none."""
        pairs = _pairs(scope, self.taken, "wide")
        if not pairs:
            return
        self.result.looked_at.append(self.labels[scope])
        plain = [pair for pair in pairs if all(map(is_linear, pair))]
        matches, reason = self._try(scope, plain) if plain else ([], None)
        if not plain:
            odd = next(linear for pair in pairs for linear in pair if not is_linear(linear))
            kind = f"{type(odd).__module__}.{type(odd).__qualname__}"
            reason = f"{self.names[odd]} is a {kind}, which is no plain linear layer (merge adapters first)"
        above_others = bool(self.taken & set(scope.modules()))
        looks = reason is not None and _looks_like_an_mlp(scope, [linear for pair in pairs for linear in pair])
        if not matches and not above_others and looks:
            self._refuse(scope, reason)
            self.taken |= set(scope.modules())

    def _try_quietly(self, scope: nn.Module, kind: str) -> None:
        """Takes the MLPs that ``scope`` computes with hidden layers of this kind, without a word if there are none."""
        plain = [pair for pair in _pairs(scope, self.taken, kind) if all(map(is_linear, pair))]
        if plain:
            self._try(scope, plain)

    def _try(self, scope: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> tuple[list[Match], str | None]:
        ups, downs = dict.fromkeys(up for up, _ in pairs), dict.fromkeys(down for _, down in pairs)
        matches, reason = trial(scope, list(ups), list(downs))
        for match in matches:
            if not self.taken & _linears_of(match):
                self.homes[match] = scope
                self.taken |= _linears_of(match)
        return matches, reason

    def _refuse_lists_of_experts(self) -> None:
        """Refuses MLPs that lie in one list beside a router, a linear layer with one output per MLP of the list."""
        homes = {home: match for match, home in self.homes.items() if home is not None}
        for parent in self.order:
            for experts in parent.children():
                members = list(experts.children())
                if not isinstance(experts, (nn.ModuleList, nn.ModuleDict)) or len(members) < 2:
                    continue
                if all(m in homes for m in members) and _has_router(parent, experts, homes[members[0]], len(members)):
                    plain = type(experts) in (nn.ModuleList, nn.ModuleDict)  # a class that nobody can register
                    self._refuse(parent if plain else experts, f"it holds {len(members)} experts already")
                    for member in members:
                        self.homes.pop(homes[member], None)

    def _refuse_shared_weights(self) -> None:
        """Refuses MLPs whose parameters another module holds too: cut into experts they would part from it."""
        holders: dict[int, list[nn.Module]] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(module)
        for match in self.homes:
            for linear in (match.up, match.gate, match.down):
                held = [] if linear is None else [h for p in linear.parameters() for h in holders[id(p)]]
                for other in {self.names[holder] for holder in held if holder is not linear}:
                    self._refuse(linear, f"{other} shares its weight")

    def _refuse(self, module: nn.Module, reason: str) -> None:
        self.result.refused.append((self.labels[module], reason))

    def _in_order(self, matches: Iterable[Match]) -> list[FoundMLP]:
        ordered = sorted(matches, key=lambda match: self.order[match.up])
        return [FoundMLP(self.names[match.down], match) for match in ordered]


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the model itself'} ({type(module).__name__})"


def _listed(items: Iterable[str], most: int = 8) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _linears_of(match: Match) -> set[nn.Module]:
    return {m for m in (match.up, match.down, match.gate) if m is not None}


def _pairs(scope: nn.Module, taken: set[nn.Module], kind: str) -> list[tuple[nn.Module, nn.Module]]:
    """(first, second) linear layers below ``scope`` that could make an MLP with ``scope`` as its smallest home.

    The first is d -> H (or 2H), the second H -> d, and they hang from different children.

    Args:
        kind: of hidden layer: ``wide``, H > d; ``equal``, H = d; ``narrow``, H < d.
    """
    if isinstance(scope, (nn.ModuleList, nn.ModuleDict)) or is_like_linear(scope):
        return []  # a list can't be called, its parent can; what is in an adapter is none of the model's
    placed: list[tuple[nn.Module, nn.Module]] = []  # (child of scope that it hangs from, linear layer)
    for child in scope.children():
        branches = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
        for branch in branches:
            placed += [(branch, m) for m in _linears_below(branch, DEPTH - 1) if m not in taken]
    pairs = []
    for up_branch, up in placed:
        for down_branch, down in placed:
            (d, wide), (hidden, back) = widths(up), widths(down)
            fits = d == back and wide in (hidden, 2 * hidden)
            of_kind = {"wide": d < hidden, "equal": d == hidden, "narrow": d > hidden}[kind]
            # Two blocks of one kind side by side are a stack of layers, not the halves of an MLP.
            stacked = up_branch is not up and type(up_branch) is type(down_branch)
            if fits and of_kind and up_branch is not down_branch and not stacked:
                pairs.append((up, down))
    return pairs


def _linears_below(module: nn.Module, depth: int) -> list[nn.Module]:
    """Linear layers and what stands in their places, whose own parts (an adapter's) are none of the model's."""
    if is_linear(module) or is_like_linear(module):
        return [module]
    return [m for child in module.children() for m in _linears_below(child, depth - 1)] if depth > 0 else []


def _looks_like_an_mlp(scope: nn.Module, linears: list[nn.Module]) -> bool:
    """Whether to name it to the user.

    Not a low-rank pair read backwards, whose larger width is the model's: more linear layers read it. Else if an
    activation is near, or it is no attention, whose q, k and v all read its input.
    """
    near = [scope, *(m for m in scope.modules() if any(child in linears for child in m.children()))]
    d_model, d_hidden = widths(linears[0])[0], widths(linears[1])[0]
    inputs = [widths(linear)[0] for linear in _linears_below(scope, sys.maxsize)]
    if inputs.count(d_hidden) > inputs.count(d_model):
        return False
    return bool(activations_of(near)) or inputs.count(d_model) < 3


def _stacked_experts(module: nn.Module) -> int:
    """The number of experts that a module's own 3-D parameters hold, 0 if they are something else.

    Experts are (N, d, H) as the second linear layers and (N, H, d) as the first, (N, H, d) twice or (N, 2H, d) with a
    gate; or each of these transposed.
    """
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim == 3]
    if len(shapes) not in (2, 3) or len({shape[0] for shape in shapes}) > 1 or shapes[0][0] < 2:
        return 0
    for down in set(shapes):
        firsts = list(shapes)
        firsts.remove(down)
        num_experts, rows, columns = down
        fitting = {(columns, rows)}
        if len(firsts) == 1:  # gate and up may be one
            fitting |= {(2 * columns, rows), (columns, 2 * rows)}
        if {first[1:] for first in firsts} <= fitting and set(shapes) != {down}:
            return num_experts
    return 0


def _has_router(parent: nn.Module, experts: nn.Module, match: Match, count: int) -> bool:
    """Whether beside ``experts`` there is a matrix from the model's width to ``count`` outputs."""
    inside, d_model = set(experts.modules()), widths(match.down)[1]
    beside = [module for module in parent.modules() if module not in inside]
    shapes = {tuple(p.shape) for module in beside for p in module.parameters(recurse=False)}
    return bool(shapes & {(count, d_model), (d_model, count)})
