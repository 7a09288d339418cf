"""What a kind of fault is, and what the kinds share."""

from __future__ import annotations

import contextlib
import random as random_module
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from commands import Command
from faults.rig import Rig, TinyTask

ROOT = Path(__file__).parents[3]
Random = random_module.Random
ALL = ("language_model", "masked_lm", "classification", "multiple_choice", "math_word_problems", "question_answering")
MAPPED = ("language_model", "masked_lm")
DAMAGES = ("truncated", "bit-flipped", "empty", "missing", "exchanged")


@dataclass(frozen=True)
class Kind:
    """`share`: of how many in a hundred faults. `tasks`: which it is done to, in turn."""

    name: str
    title: str
    share: int
    tasks: tuple[str, ...]
    run: Callable[[Rig, TinyTask, Random], None]


KINDS: dict[str, Kind] = {}


def kind(name: str, title: str, share: int, tasks: tuple[str, ...] = ALL) -> Callable:
    def add(function: Callable[[Rig, TinyTask, Random], None]) -> Callable[[Rig, TinyTask, Random], None]:
        KINDS[name] = Kind(name, title, share, tasks, function)
        return function

    return add


def strike(command: Command, number: int) -> None:
    """Sends the signal, if the process has not just ended."""
    with contextlib.suppress(ProcessLookupError):
        command.kill(number)


_turns: dict[str, int] = {}


def in_turn(name: str, *choices: tuple) -> tuple:
    """All combinations of the choices, one after the other."""
    turn = _turns[name] = _turns.get(name, -1) + 1
    picked = []
    for options in choices:
        turn, index = divmod(turn, len(options))
        picked.append(options[index])
    return tuple(picked)
