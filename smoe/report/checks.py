"""A finding as comparisons of numbers: what each comes to, and what they come to together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from smoe.report.statistics import Difference, paired_difference

# The largest difference that counts as none, in the metric's own unit. 0.01 bits is what the paper draws conclusions
# from: SMoE-Dropout is ahead of dense by 0.0137 with Transformer-XL.
MARGINS = {"bpc": 0.01, "bits_per_masked_token": 0.01, "accuracy": 0.005, "solving_rate": 0.005, "exact_match": 0.005}
DEFAULT_MARGIN = 0.01
BELOW = "neither beats its floor"  # a note: both may have learned nothing


class Status(IntEnum):
    """What a comparison, or a finding made of several, comes to; the weakest part decides, in this order."""

    NOT_HELD = 0
    NOT_RUN = 1
    FEW_SEEDS = 2
    NO_DIFFERENCE = 3
    WITHIN_NOISE = 4
    HELD = 5


@dataclass(frozen=True)
class Check:
    """One comparison: ``better`` is said to be better than ``worse``; ``difference`` is positive where it is.

    at: the means of the two, over the seeds that both have. note: what the status does not say.
    """

    better: str
    worse: str
    status: Status
    at: tuple[float, float] | None = None
    difference: Difference | None = None
    note: str = ""

    @property
    def tells_nothing(self) -> bool:
        """Whether both may be alike because they have learned nothing."""
        return self.note == BELOW and self.status in (Status.NO_DIFFERENCE, Status.WITHIN_NOISE)


@dataclass
class Finding:
    """A statement of the paper, checked on the runs of one context. ``key``: of the claim; ``where``: in the paper."""

    key: str
    statement: str
    where: str
    subject: str
    context: str
    scale: str
    checks: list[Check] = field(default_factory=list)

    @property
    def status(self) -> Status:
        """That of its weakest check, of those that tell something if there are any; without any it is not run."""
        return weakest(self.checks)

    @property
    def words(self) -> str:
        """The status as text; with fewer than three seeds never more than what was seen."""
        if self.status is Status.NOT_RUN and any(check.status is not Status.NOT_RUN for check in self.checks):
            return "not run in full"
        if self.status is not Status.FEW_SEEDS:
            return status_words(self.status)
        few = [check for check in self.checks if check.status is Status.FEW_SEEDS and check.difference]
        least = min(len(check.difference.seeds) for check in few if check.difference)
        against = sum(check.difference.mean <= 0 for check in few if check.difference)
        seen = f"as claimed in {len(few) - against} of {len(few)}"
        return f"{_seeds(least)}, no interval ({seen})"


def weakest(checks: Sequence[Check]) -> Status:
    """The status of several comparisons together."""
    telling = [check for check in checks if not check.tells_nothing] or checks
    return min((check.status for check in telling), default=Status.NOT_RUN)


def status_words(status: Status) -> str:
    """``held``, ``not held``, ``within noise``, ..."""
    return status.name.lower().replace("_", " ")


def check_words(check: Check) -> str:
    """The status of one check as text."""
    words = status_words(check.status)
    if check.status is Status.FEW_SEEDS and check.difference is not None:
        mean = check.difference.mean
        seen = "as claimed" if mean > 0 else "against the claim" if mean < 0 else "a tie"
        words = f"{_seeds(len(check.difference.seeds))}, no interval: {seen}"
    return f"{words} ({check.note})" if check.note else words


def compare(
    better: str, a: Mapping[Any, float], worse: str, b: Mapping[Any, float], metric: Mapping[str, Any]
) -> Check:
    """Checks that ``a`` is better than ``b``, both by seed, as the metric's direction has it.

    With three seeds or more: *held* if the interval of the paired difference lies above 0, *not held* if below, else
    *no difference* if it is shown to be within the margin, else *within noise*.
    """
    sign = 1 if metric["direction"] == "lower" else -1
    theirs, ours = ({seed: sign * value for seed, value in values.items()} for values in (b, a))
    difference = paired_difference(theirs, ours, MARGINS.get(metric["key"], DEFAULT_MARGIN))
    if difference is None:
        return Check(better, worse, Status.NOT_RUN)
    means = tuple(sum(values[seed] for seed in difference.seeds) / len(difference.seeds) for values in (a, b))
    return Check(better, worse, status_of(difference), (means[0], means[1]), difference)


def status_of(difference: Difference) -> Status:
    """What a difference comes to, by its interval."""
    if difference.low is None or difference.high is None:
        return Status.FEW_SEEDS
    if difference.low > 0:
        return Status.HELD
    if difference.high < 0:
        return Status.NOT_HELD
    return Status.NO_DIFFERENCE if difference.equivalent else Status.WITHIN_NOISE


def gaps(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[Any, float]:
    """``a`` minus ``b`` by seed, over the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}


def check_all(pairs: Sequence[tuple[str, Mapping[Any, float]]], metric: Mapping[str, Any]) -> list[Check]:
    """Checks that each of several, in order, is worse than the next."""
    steps = zip(pairs[:-1], pairs[1:], strict=True)
    return [compare(later, b, earlier, a, metric) for (earlier, a), (later, b) in steps]


def _seeds(count: int) -> str:
    return {1: "one seed", 2: "two seeds"}[count]
