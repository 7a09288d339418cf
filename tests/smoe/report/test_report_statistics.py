"""Intervals and tests against textbook formulas, with quantiles from printed tables."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from smoe.report.statistics import mcnemar, paired_bootstrap, paired_difference, wilson_interval

T_2, T_4 = 4.302653, 2.776445  # two-sided 95 % quantiles of t with 2 and 4 degrees of freedom
ONE_SIDED_T_2 = 2.919986  # one-sided 5 %


def test_t_interval_of_differences_paired_by_seed():
    a, b = {1: 2.30, 2: 2.35, 3: 2.31, 9: 99.0}, {3: 2.21, 1: 2.18, 2: 2.29, 8: -99.0}
    found = paired_difference(a, b, margin=0.01)
    differences = [0.12, 0.06, 0.10]
    half = T_2 * stdev(differences) / math.sqrt(3)
    assert found.seeds == (1, 2, 3) and found.mean == pytest.approx(fmean(differences))
    assert found.low == pytest.approx(fmean(differences) - half, abs=1e-6)
    assert found.high == pytest.approx(fmean(differences) + half, abs=1e-6)
    assert not found.equivalent
    five = {seed: value for seed, value in enumerate([0.1, 0.4, 0.2, 0.3, 0.5])}
    found = paired_difference(five, dict.fromkeys(five, 0.0), margin=0.01)
    assert found.high - found.mean == pytest.approx(T_4 * stdev(five.values()) / math.sqrt(5), abs=1e-6)


def test_equivalence_is_shown_when_both_one_sided_tests_reject():
    differences = {1: 0.001, 2: -0.002, 3: 0.002}
    zero = dict.fromkeys(differences, 0.0)
    error = stdev(differences.values()) / math.sqrt(3)
    least = abs(fmean(differences.values())) + ONE_SIDED_T_2 * error  # the smallest margin that can be shown
    assert paired_difference(differences, zero, margin=least * 1.01).equivalent
    assert not paired_difference(differences, zero, margin=least * 0.99).equivalent


def test_fewer_than_three_seeds_give_no_interval():
    found = paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 1.0, 3: 0.0}, margin=10)
    assert (found.seeds, found.mean, found.low, found.high) == ((1, 2), 1.5, None, None)
    assert not found.equivalent
    assert paired_difference({1: 2.0}, {2: 1.0}, margin=1) is None


def test_equal_differences_have_no_spread():
    a, zero = {1: 0.5, 2: 0.5, 3: 0.5}, {1: 0.0, 2: 0.0, 3: 0.0}
    found = paired_difference(a, zero, margin=1.0)
    assert (found.low, found.high, found.equivalent) == (0.5, 0.5, True)
    assert not paired_difference(a, zero, margin=0.1).equivalent


@pytest.mark.parametrize("successes, n", [(0, 10), (7, 10), (10, 10), (654, 872)])
def test_wilson_interval(successes, n):
    z, share = 1.959964, successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert wilson_interval(successes, n) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_mcnemar_is_a_sign_test_on_the_answers_that_differ():
    a = [True] * 50 + [True] * 9 + [False] * 2 + [False] * 5
    b = [True] * 50 + [False] * 9 + [True] * 2 + [False] * 5
    tail = sum(math.comb(11, i) for i in range(3)) / 2**11
    assert mcnemar(a, b) == pytest.approx(2 * tail)
    assert mcnemar(a, a) == 1.0


def test_paired_bootstrap_agrees_with_resampling_by_hand():
    generator = random.Random(1)
    a = [generator.random() for _ in range(60)]
    b = [x - 0.1 + 0.2 * generator.random() for x in a]
    low, high = paired_bootstrap(a, b)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    means = sorted(fmean(generator.choices(differences, k=60)) for _ in range(4000))
    assert (low, high) == pytest.approx((means[100], means[3900]), abs=0.003)
    assert paired_bootstrap(a, b) == (low, high)  # the seed decides


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: wilson_interval(3, 2), "successes is 3, n is 2; it must be 0 <= successes <= n"),
        (lambda: wilson_interval(0, 0), "n is 0"),
        (lambda: mcnemar([True], [True, False]), "a has 1 examples, b has 2; both must have the same"),
        (lambda: paired_bootstrap([1.0], [1.0]), "a has 1 examples, b has 1; both must have the same, at least 2"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
