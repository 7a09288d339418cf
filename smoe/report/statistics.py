"""The statistics of all reports, on scipy: differences between runs, shares, and answers compared example by example.

Every interval is a 95 % interval. scipy is imported where it is used: it comes with ``pip install smoe[report]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_SEEDS = 3  # fewer give no interval
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference, paired by seed.

    Attributes:
        seeds: those that both sides have.
        mean: of theirs minus ours. low, high: its t interval; None with fewer than ``LEAST_SEEDS`` seeds.
        equivalence: p of the two one-sided tests that the difference is within ±margin; None without an interval.
    """

    seeds: tuple[Any, ...]
    mean: float
    margin: float
    low: float | None = None
    high: float | None = None
    equivalence: float | None = None

    @property
    def equivalent(self) -> bool:
        """Whether the difference is shown to be within ±margin."""
        return self.equivalence is not None and self.equivalence < 1 - CONFIDENCE


def paired_difference(a: Mapping[Any, float], b: Mapping[Any, float], margin: float) -> Difference | None:
    """``a`` minus ``b``, both by seed, over the seeds that both have; None when there is none.

    Args:
        margin: the largest difference that counts as none, in the unit of the values.
    """
    seeds = tuple(sorted(a.keys() & b.keys(), key=str))
    if not seeds:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    mean = sum(differences) / len(seeds)
    if len(seeds) < LEAST_SEEDS:
        return Difference(seeds, mean, margin)
    if max(differences) - min(differences) < 1e-12:  # no spread, no t
        return Difference(seeds, mean, margin, mean, mean, 0.0 if abs(mean) < margin else 1.0)
    from scipy.stats import ttest_1samp

    interval = ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    above = ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = ttest_1samp(differences, margin, alternative="less").pvalue
    return Difference(seeds, mean, margin, float(interval.low), float(interval.high), float(max(above, below)))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The Wilson score interval of a share, ``successes`` of ``n`` examples. ValueError unless 0 <= successes <= n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}, n is {n}; it must be 0 <= successes <= n and 1 <= n")
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """p of McNemar's exact test that two models are right equally often on the same examples.

    Args:
        a, b: whether each model is right, example by example. ValueError when their lengths differ.
    """
    _check_paired(a, b)
    from scipy.stats import binomtest

    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of mean(a) - mean(b), resampling examples.

    Args:
        a, b: the values of two models, example by example. ValueError when their lengths differ.
    """
    _check_paired(a, b)
    import numpy

    differences = numpy.asarray(a, dtype=float) - numpy.asarray(b, dtype=float)
    # How often each value is drawn in a resample of n: of shares there are three values, so n does not matter.
    values, times = numpy.unique(differences, return_counts=True)
    n, generator = len(differences), numpy.random.default_rng(seed)
    step = max(1, 10**7 // len(values))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    means = numpy.concatenate([generator.multinomial(n, times / n, size) @ values / n for size in sizes])
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The t interval of a mean over seeds; None with fewer than ``LEAST_SEEDS`` values."""
    if len(values) < LEAST_SEEDS:
        return None
    if max(values) - min(values) < 1e-12:  # no spread, no t
        return values[0], values[0]
    from scipy.stats import ttest_1samp

    interval = ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def _check_paired(a: Sequence[Any], b: Sequence[Any]) -> None:
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a has {len(a)} examples, b has {len(b)}; both must have the same, at least 2")
