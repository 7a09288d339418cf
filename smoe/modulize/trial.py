"""What a module computes between two linear layers, found by trying it out.

The linear layers are swapped for stand-ins: the first ones of possible MLPs answer with random numbers of our choosing,
the second ones note what reaches them. If that is ``act(numbers)``, or ``act(numbers) * other numbers``, for a known
elementwise ``act``, the module's own code has said what its MLP is. Attention, mixers and norms in between fail the
comparison, whatever the modules and their attributes are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import ACTIVATIONS, Activation, get_activation
from .linear import is_linear, widths

TOKENS = 8  # enough numbers to tell activations and dropout rates apart even in a tiny MLP


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (Primer; So et al. 2021)."""
    return F.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by a sigmoid, as CLIP has it."""
    return x * torch.sigmoid(1.702 * x)


# Activations that models write into their forward instead of keeping them as an attribute.
WRITTEN_OUT = (
    *(relu2, quick_gelu, torch.tanh, torch.sigmoid, torch.sin, F.elu, F.selu, F.leaky_relu, F.mish, F.softplus),
    *(F.softsign, F.hardswish, F.hardtanh, F.hardsigmoid, F.relu6),
)


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
    """The trial did run and shows that there is no MLP. ``reason`` says why one could think so; None: nobody could."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(reason)
        self.reason = reason


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


def trial(scope: nn.Module, ups: list[nn.Module], downs: list[nn.Module]) -> tuple[list[Match], str | None]:
    """The MLPs that ``scope`` computes with these linear layers, and, if there are none, why not.

    The reason is None where what ``scope`` computes is plainly something else: attention and other mixing of tokens, or
    linear layers that are called in another order (low-rank projections). Nothing of ``scope`` changes: modes, buffers
    and the random state are put back.
    """
    reason = None
    with _undisturbed(scope):
        for run in _ways_to_call(scope, ups, downs):
            try:
                return _try(scope, run, ups, downs), None
            except _Contradiction as contradiction:
                return [], contradiction.reason
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
        raise _Contradiction(_why_not(scope, run, ups, downs, seen))
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
Seen = dict[nn.Module, tuple[Tensor, Given]]  # linear layer -> (its input, what those before it had answered)


def _observe(
    run: Callable[[], object],
    ups: list[nn.Module],
    downs: list[nn.Module],
    answers: Mapping[nn.Module, Tensor] | None = None,
) -> Seen:
    """One run: what reached ``downs``. ``ups`` answer with ``answers`` or, without, with random numbers."""
    given: Given = {}
    seen: Seen = {}

    def stand_in(linear: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if linear in downs:
                seen[linear] = (x.clone(), dict(given))
            shape = (*x.shape[:-1], widths(linear)[1])
            if linear not in ups:
                return torch.zeros(shape, dtype=linear.weight.dtype, device=x.device)
            numbers = (answers or {}).get(linear)
            if numbers is None or numbers.shape != shape:
                numbers = 3 * torch.randn(shape, dtype=torch.float32, device=x.device)
            given[linear] = (x, numbers)
            return numbers.clone()  # the model may activate in place

        return forward

    with ExitStack() as stack:
        for linear in dict.fromkeys([*ups, *downs]):
            linear.forward = stand_in(linear)
            stack.callback(vars(linear).pop, "forward")
        run()
    return seen


def _why_not(
    scope: nn.Module, run: Callable[[], object], ups: list[nn.Module], downs: list[nn.Module], seen: Seen
) -> str | None:
    """Why what reached the second linear layers is no MLP's hidden units; None if nobody could take it for them."""
    for down, (hidden, given) in seen.items():
        feeding = {up: numbers for up, (_, numbers) in given.items() if _feeds(numbers, hidden)}

        def rerun(change: Callable[[Tensor], Tensor], down: nn.Module = down, given: Given = given) -> Tensor:
            answers = {up: change(numbers.clone()) for up, (_, numbers) in given.items()}
            return _observe(run, ups, downs, answers)[down][0]

        in_a_row = any(_close(numbers, hidden) for numbers in feeding.values())  # two linear layers, nothing between
        # Called before any first layer, as the second half of something else; or attention, or another mixer of tokens.
        if not feeding or in_a_row or _mixes_tokens(hidden, rerun):
            continue
        if not _is_elementwise(hidden, rerun):
            return "what reaches its second linear layer is no activation of what left its first"
        names = {module: name for name, module in scope.named_modules()}
        fields = dict(zip(("up", "gate"), feeding, strict=False)) | {"down": down}
        call = ", ".join(f"{field}={names[linear]!r}" for field, linear in fields.items())
        return (
            "its activation is elementwise, but none that smoe knows; smoe.register_mlp("
            f"{type(scope).__name__}, {call}, activation=...) takes the function"
        )
    return None


Rerun = Callable[
    [Callable[[Tensor], Tensor]], Tensor
]  # how to change the answers -> what then reaches the second layer


def _mixes_tokens(hidden: Tensor, rerun: Rerun) -> bool:
    """Whether the last token's hidden units depend on other tokens."""

    def redraw_all_but_the_last(numbers: Tensor) -> Tensor:
        rows = numbers.flatten(0, -2)
        rows[:-1] = torch.randn_like(rows[:-1])
        return rows.view_as(numbers)

    last, other = (h.flatten(0, -2)[-1] for h in (hidden, rerun(redraw_all_but_the_last)))
    return not _close(last, other)


def _is_elementwise(hidden: Tensor, rerun: Rerun) -> bool:
    """Whether each hidden unit is one and the same function of its own unit in the answers."""
    width = hidden.shape[-1]

    def by_unit(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        # Gate and up in one layer have every unit twice.
        return lambda n: n if n.shape[-1] % width else change(n.unflatten(-1, (-1, width))).flatten(-2)

    def redraw_first_half(numbers: Tensor) -> Tensor:
        numbers[..., : width // 2] = torch.randn_like(numbers[..., : width // 2])
        return numbers

    kept, flipped = rerun(by_unit(redraw_first_half)), rerun(by_unit(lambda numbers: numbers.flip(-1)))
    return _close(kept[..., width // 2 :], hidden[..., width // 2 :]) and _close(flipped, hidden.flip(-1))


def _feeds(numbers: Tensor, hidden: Tensor) -> bool:
    """Whether an answer of this shape could become the hidden units."""
    return hidden.shape[-1] > 0 and numbers.numel() in (hidden.numel(), 2 * hidden.numel())


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3)


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
