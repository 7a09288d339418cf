"""Equations of word problems in prefix form, e.g. ``- + number0 number1 2.0``: checked and computed.

A token is an operator, a slot (``number3``: the fourth number of the problem's text) or a constant. A model writes
these tokens, so they are only ever data: an equation that is malformed or has no value is wrong, and nothing else.

    python -m bert.equations --data data/mawps     # lists the problems whose own equation does not give their answer
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoe.errors import Parser, run_main
from smoe.json_files import parse_json
from smoe.prepared import read_prepared

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


def tested_problems(folder: Path) -> list[dict[str, Any]]:
    """The different problems that the folds of a folder of data/{asdiv_a,mawps,svamp}/prepare.py test on, in order.

    Raises ValueError, in one line, when the folder is not prepared, has no problems, or holds one that can't be read.
    """
    advice = f"run: python data/{folder.name}/prepare.py --out {folder}"
    splits = [name for name in read_prepared(folder, advice, (), {})["splits"] if name.endswith("-test")]
    if not splits:
        raise ValueError(f"data: {folder} has no fold with test problems; it must be of word problems")
    meta = read_prepared(folder, advice, splits, {})
    found: dict[str, dict[str, Any]] = {}  # MAWPS has some problems more than once
    for file in (folder / meta["splits"][name]["file"] for name in splits):
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                row = parse_json(line)
                problem = {"question": str(row["question"]), "equation": row["equation"].split()}
                problem |= {"numbers": [*map(float, row["numbers"])], "answer": float(row["answer"])}
                found.setdefault(line, problem)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"data: {file} is damaged ({error}); {advice} --force") from None
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Lists the problems whose equation does not give the stored answer, each with what it gives instead."""
    parser = Parser(prog="python -m bert.equations", description="Computes every test problem's own equation.")
    parser.add_argument("--data", type=Path, required=True, help="a folder of data/{asdiv_a,mawps,svamp}/prepare.py")
    problems = tested_problems(parser.parse_args(argv).data)
    wrong = [p for p in problems if not solves(p["equation"], p["numbers"], p["answer"])]
    for problem in wrong:
        try:
            value = f"{evaluate(problem['equation'], problem['numbers']):g}"
        except EquationError as error:
            value = str(error)
        numbers = ", ".join(f"{number:g}" for number in problem["numbers"])
        print(f"{' '.join(problem['equation'])} with {numbers}: {value}, stored {problem['answer']:g}")
        print(f"    {' '.join(problem['question'].split())}")
    print(f"{len(problems) - len(wrong)} of {len(problems)} different problems are solved by their own equation")


def _shown(tokens: Sequence[str]) -> str:
    text = " ".join(tokens)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


if __name__ == "__main__":
    run_main(main)
