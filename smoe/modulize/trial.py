"""What a piece of a model computes between two linear layers, found by trying it out.

The linear layers of a module are swapped for stand-ins: those that widen answer with random numbers of our choosing,
those that narrow note what reaches them. If that is ``act(numbers)``, or ``act(numbers) * other numbers``, for a known
elementwise ``act``, the module's own code has said what its MLP is: attention, mixers and norms in between fail the
comparison, whatever the modules and their attributes are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import ACTIVATIONS, Activation, get_activation
from .linear import is_linear, widths

TOKENS = 8  # enough numbers to tell activations and dropout rates apart even in a tiny MLP

# Activations that models write into their forward instead of keeping them as an attribute.
WRITTEN_OUT = (torch.tanh, torch.sigmoid, F.elu, F.leaky_relu, F.mish, F.softplus, F.hardswish, F.relu6)


@dataclass(frozen=True)
class Match:
    """down's input is ``dropout(act(up(x)))``, or ``dropout(act(gate(x)) * up(x))``.

    fused: None; or ``gate_first`` / ``gate_last``: up is one linear layer of width 2H with the gate as that half.
    """

    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    fused: str | None
    activation: Activation
    dropout: float


class _Contradiction(Exception):
    """The trial did run, and shows that these are no MLPs; the message says why."""


def as_activation(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """``function`` as an activation, one of ``ACTIVATIONS`` where it is the same function; None if not elementwise."""
    points = torch.linspace(-8, 8, 128).view(2, 64)
    try:
        with torch.no_grad():
            value = function(points.clone())
            # Elementwise: neither the order nor the rest of the numbers matters (a softmax passes the first alone).
            elementwise = torch.allclose(value.flip(0, 1), function(points.flip(0, 1)), atol=1e-6)
            elementwise = elementwise and torch.allclose(value[:1, :32], function(points[:1, :32].clone()), atol=1e-6)
    except Exception:
        return None
    if not elementwise or torch.equal(value, points):
        return None
    for known in ACTIVATIONS.values():
        if torch.allclose(known(points), value, rtol=1e-6, atol=1e-6):
            return known
    return get_activation(function)


def activations_of(modules: list[nn.Module]) -> list[Activation]:
    """The elementwise functions that ``modules`` hold as attributes or submodules, in order, each once."""
    found: dict[int | str, Activation] = {}
    for module in modules:
        for value in (*vars(module).values(), *module.children()):
            if isinstance(value, nn.Module):
                usable = not any(True for _ in value.parameters()) and not any(True for _ in value.children())
            else:
                usable = callable(value) and not isinstance(value, type) and value is not F.dropout
            activation = as_activation(value) if usable else None
            if activation is not None:
                found.setdefault(activation.name if activation.name in ACTIVATIONS else id(value), activation)
    return list(found.values())


def trial(scope: nn.Module, ups: list[nn.Module], downs: list[nn.Module]) -> tuple[list[Match], str]:
    """The MLPs that ``scope`` computes with these linear layers, and, if there are none, why.

    Nothing of ``scope`` changes: modes, buffers and the random state are put back.
    """
    reason = ""
    with _undisturbed(scope):
        for run in _ways_to_call(scope, ups, downs):
            try:
                return _try(scope, run, ups, downs), ""
            except _Contradiction as contradiction:
                return [], str(contradiction)
            except Exception as error:  # this way of calling it does not fit; the next one may
                reason = reason or f"it can't be tried out alone ({type(error).__name__})"
    return [], reason


def _try(scope: nn.Module, run: Callable[[], object], ups: list[nn.Module], downs: list[nn.Module]) -> list[Match]:
    scope.eval()
    acts = activations_of(list(scope.modules()))
    acts += [known for name, known in ACTIVATIONS.items() if name not in {a.name for a in acts}]
    acts += [get_activation(function) for function in WRITTEN_OUT]
    seen = _observe(run, ups, downs)
    if not seen:
        raise RuntimeError("the second linear layer was not reached")
    matches = []
    for down, (hidden, given) in seen.items():
        found = _explain(hidden, given, acts)
        if found is not None:
            matches.append((found, down))
    if not matches:
        raise _Contradiction("what reaches its second linear layer is no activation of what left its first")
    scope.train()
    seen = _observe(run, ups, downs)
    result = []
    for (up, gate, fused, activation), down in matches:
        if down not in seen:
            raise _Contradiction("in training its second linear layer is not reached")
        hidden, given = seen[down]
        expected = _value(given, up, gate, fused, activation)
        result.append(Match(up, down, gate, fused, activation, _dropout_rate(hidden, expected)))
    return result


Given = dict[nn.Module, tuple[Tensor, Tensor]]  # linear layer -> (its input, the numbers it answered with)


def _observe(run, ups, downs) -> dict[nn.Module, tuple[Tensor, Given]]:
    """down -> (what reached it, what the layers before it had answered), of one run."""
    given: Given = {}
    seen: dict[nn.Module, tuple[Tensor, Given]] = {}

    def answer(up: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            numbers = 3 * torch.randn(*x.shape[:-1], widths(up)[1], device=x.device)
            given[up] = (x, numbers)
            return numbers.clone()  # the model may activate in place

        return forward

    def note(down: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            seen[down] = (hidden.clone(), dict(given))
            return torch.zeros(*hidden.shape[:-1], widths(down)[1], dtype=down.weight.dtype, device=hidden.device)

        return forward

    with ExitStack() as stack:
        for linear, stand_in in [(up, answer(up)) for up in ups] + [(down, note(down)) for down in downs]:
            linear.forward = stand_in
            stack.callback(vars(linear).pop, "forward")
        run()
    return seen


def _value(given: Given, up: nn.Module, gate: nn.Module | None, fused: str | None, activation: Activation) -> Tensor:
    numbers = given[up][1]
    if fused:
        first, second = numbers.chunk(2, -1)
        return activation(first) * second if fused == "gate_first" else first * activation(second)
    return activation(numbers) if gate is None else activation(given[gate][1]) * numbers


def _explain(hidden: Tensor, given: Given, acts: list[Activation]):
    """(up, gate, fused, activation) that give ``hidden``, or None."""
    same = [up for up, (_, numbers) in given.items() if numbers.shape == hidden.shape]
    double = (*hidden.shape[:-1], 2 * hidden.shape[-1])
    forms = [(up, None, None) for up in same]
    forms += [
        (up, gate, None) for up in same for gate in same if _reads_the_same(given[up][0], given[gate][0], up, gate)
    ]
    forms += [(up, None, f) for up in given if given[up][1].shape == double for f in ("gate_first", "gate_last")]
    eps = torch.finfo(hidden.dtype).eps
    tolerance = 1e-5 if eps < 1e-5 else 4 * eps
    for activation in acts:
        for form in forms:
            value = _value(given, *form, activation)
            if torch.allclose(value, hidden.to(value.dtype), rtol=tolerance, atol=tolerance):
                return *form, activation
    return None


def _reads_the_same(x: Tensor, other: Tensor, up: nn.Module, gate: nn.Module) -> bool:
    return up is not gate and x.shape == other.shape and torch.equal(x, other)


def _dropout_rate(hidden: Tensor, expected: Tensor) -> float:
    """p of the inverted dropout between ``expected`` and ``hidden``: what is kept is 1 / (1 - p) as large."""
    clear = expected.abs() > 1e-2 * expected.abs().max()
    ratio = (hidden.to(expected.dtype) / expected)[clear]
    kept = ratio[ratio != 0]
    if kept.numel() == 0:
        return 1.0
    scale = kept.median()
    low = torch.finfo(hidden.dtype).eps > 1e-5
    if not torch.allclose(kept, scale.expand_as(kept), rtol=2e-2 if low else 1e-4):
        raise _Contradiction("in training it does more to the hidden units than a dropout")
    rate = round(1 - 1 / scale.item(), 2 if low else 4)
    if rate < 0 or (rate == 0 and kept.numel() < ratio.numel()):
        raise _Contradiction("in training it does more to the hidden units than a dropout")
    return rate


def _ways_to_call(scope: nn.Module, ups: list[nn.Module], downs: list[nn.Module]) -> Iterator[Callable]:
    """Calls of ``scope`` to try: all of it, then without its attention, then its two halves (BERT's) alone."""
    weight, d_model = ups[0].weight, widths(ups[0])[0]
    tokens = torch.randn(1, TOKENS, d_model, device=weight.device).to(weight.dtype)
    image = torch.randn(1, d_model, 4, 4, device=weight.device).to(weight.dtype)
    members = set(ups) | set(downs)
    others = [c for c in scope.children() if not members & set(c.modules()) and any(map(is_linear, c.modules()))]
    missing = len(_required(scope)) - 1
    for answer in (None, lambda x: x, lambda x: (x, None), lambda x: (x, None, None)):
        if answer is not None and not others:
            break
        for x in (tokens, image):
            for rest in ([None] * missing, [x] * missing) if missing > 0 else ([],):
                yield lambda x=x, rest=rest, answer=answer: _call(scope, x, rest, others if answer else [], answer)
    halves = [child for child in scope.children() if members & set(child.modules()) and child not in members]
    if len(halves) == 2 and len(members) == 2:
        first, second = halves if ups[0] in set(halves[0].modules()) else halves[::-1]
        yield lambda: second(first(tokens))
        yield lambda: second(first(tokens), tokens)


def _call(scope: nn.Module, x: Tensor, rest: list, others: list[nn.Module], answer: Callable) -> None:
    """One call, with ``others`` (attention, whose arguments nobody knows) just handing on what they get."""
    with ExitStack() as stack:
        for other in others:
            other.forward = lambda *args, **kwargs: answer(args[0] if args else next(iter(kwargs.values())))
            stack.callback(vars(other).pop, "forward")
        scope(x, *rest)


def _required(scope: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(scope.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


@contextmanager
def _undisturbed(scope: nn.Module) -> Iterator[None]:
    """Within the block ``scope`` may be run in any mode; it, its buffers and the random state come out as they were."""
    modules = list(scope.modules())
    modes = [module.training for module in modules]
    chunks = [(m, m.chunk_size_feed_forward) for m in modules if hasattr(m, "chunk_size_feed_forward")]
    buffers = [(buffer, buffer.clone()) for buffer in scope.buffers()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device for p in scope.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        # nn.TransformerEncoderLayer's fast path reads its weights without calling its linear layers.
        torch.backends.mha.set_fastpath_enabled(False)
        torch.manual_seed(0)
        for module, _ in chunks:
            module.chunk_size_feed_forward = 0
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, chunk in chunks:
                module.chunk_size_feed_forward = chunk
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for buffer, before in buffers:
                buffer.copy_(before)
