"""Equations of word problems in prefix form, e.g. ``- + number0 number1 2.0``: checked and computed.

A token is an operator, a slot (``number3``: the fourth number of the problem's text) or a constant. A model writes
these tokens, so they are only ever data: an equation that is malformed or has no value is wrong, and nothing else.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
# The largest difference from the answer that still counts as solved, that of Patel et al. 2021 and of MWPToolkit.
TOLERANCE = 1e-4

_SLOT = re.compile(r"number([0-9]{1,3})")
_CONSTANT = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")


class EquationError(ValueError):
    """An equation that is malformed or has no value; the message is one line that says why."""


def slot_index(token: str) -> int | None:
    """3 for ``number3``; None for a token that is no slot."""
    match = _SLOT.fullmatch(token)
    return int(match[1]) if match else None


def is_constant(token: str) -> bool:
    """Whether ``token`` is a decimal number such as ``100.0``."""
    return _CONSTANT.fullmatch(token) is not None


def check_slots(text: str, count: int) -> None:
    """ValueError unless the slots of ``text`` are those of ``count`` numbers, each once and in order."""
    slots = [word for word in text.split() if slot_index(word) is not None]
    if slots != [f"number{i}" for i in range(count)]:
        raise ValueError(f"the text has the slots {' '.join(slots) or '(none)'}, but there are {count} numbers")


def check(tokens: Sequence[str], slots: int) -> None:
    """EquationError unless ``tokens`` are one whole equation over at most ``slots`` numbers."""
    missing = 1  # operands that are still to come
    for token in tokens:
        if missing == 0:
            raise EquationError(f"{_shown(tokens)} is complete before {token!r}")
        if token in OPERATORS:
            missing += 1
            continue
        index = slot_index(token)
        if index is not None and index >= slots:
            raise EquationError(f"{_shown(tokens)} has {token}, but the problem has {slots} numbers, from number0 on")
        if index is None and not is_constant(token):
            raise EquationError(f"{_shown(tokens)}: {token!r} is no operator, slot or number")
        missing -= 1
    if missing:
        raise EquationError(f"{_shown(tokens)} ends too early, {missing} more operands are needed")


def evaluate(tokens: Sequence[str], numbers: Sequence[float]) -> float:
    """The value of an equation, number i of the text being ``numbers[i]``; always finite.

    Raises EquationError when it is malformed, divides by zero, or is too large for a float.
    """
    check(tokens, len(numbers))
    stack: list[float] = []
    for token in reversed(tokens):  # so that both operands are there when their operator comes
        if token in OPERATORS:
            left, right = stack.pop(), stack.pop()
            if token == "/" and right == 0:
                raise EquationError(f"{_shown(tokens)} divides by zero")
            stack.append(OPERATORS[token](left, right))
        else:
            index = slot_index(token)
            stack.append(float(token if index is None else numbers[index]))
    (value,) = stack
    if not math.isfinite(value):
        raise EquationError(f"{_shown(tokens)} is too large a number")
    return value


def solves(tokens: Sequence[str], numbers: Sequence[float], answer: float) -> bool:
    """Whether the value of an equation is ``answer``, to ``TOLERANCE``. One without a value solves nothing."""
    try:
        return abs(evaluate(tokens, numbers) - answer) <= TOLERANCE
    except EquationError:
        return False


def _shown(tokens: Sequence[str]) -> str:
    text = " ".join(tokens)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
