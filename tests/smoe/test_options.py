"""Fields of a configuration with bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from smoe.options import check_bounds, field_metadata, option, required


@dataclass(frozen=True)
class Base:
    name: str = required("a name")
    count: int = option(3, "how many", at_least=1, at_most=9)
    share: float = option(0.5, "how much", at_least=0, below=1)
    rate: float | None = option(None, "how fast", above=0)
    free: int = option(-5, "anything")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Longer(Base):
    count: int = 7  # note and bounds stay
    more: int = option(1, "one more", at_least=1)


@pytest.mark.parametrize("kind", [Base, Longer])
@pytest.mark.parametrize(
    ("field", "good", "bad", "words"),
    [
        ("count", (1, 9), (0, 10, 2.0, True, "3", math.nan), "it must be a whole number at least 1 and at most 9"),
        ("share", (0, 0.0, 0.999), (1, 1.0, -1e-9, math.nan, False), "it must be a number at least 0 and below 1"),
        ("rate", (None, 1e-9, 3), (0, -1.0, math.nan), "it must be a number above 0"),
        ("free", (-99, 0), (), ""),
    ],
)
def test_bounds_are_kept_by_subclasses_too(kind, field, good, bad, words):
    for value in good:
        assert getattr(kind("x", **{field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError) as caught:
            kind("x", **{field: value})
        assert str(caught.value) == f"{field} is {value!r}; {words}"


def test_what_is_said_of_a_field_is_said_once():
    assert Longer("x").count == 7
    base, longer = field_metadata(Base), field_metadata(Longer)
    assert longer == {**base, "more": {"help": "one more", "whole": True, "at_least": 1}}
    assert base["name"] == {"help": "a name"} and base["count"]["help"] == "how many"
