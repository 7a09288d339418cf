"""The number of activated experts at a step."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe import k_at, ks_at
from smoe.schedule import MODES

UP = ("linear", "cosine", "exponential", "multistep")
DOWN = ("linear_decrease", "cosine_decrease", "multistep_decrease")
bounds = st.integers(1, 64).flatmap(lambda low: st.tuples(st.just(low), st.integers(low, 64)))


@given(bounds, st.integers(1, 300), st.sampled_from(UP + DOWN))
def test_endpoints_range_and_monotone(limits, total, mode):
    k_min, k_max = limits
    ks = [k_at(step, total, k_min, k_max, mode) for step in range(total + 3)]
    first, last = (k_min, k_max) if mode in UP else (k_max, k_min)
    assert ks[0] == first
    assert ks[total:] == [last] * 3
    sign = 1 if mode in UP else -1
    assert all(sign * (b - a) >= 0 for a, b in zip(ks, ks[1:], strict=False))
    assert all(type(k) is int and k_min <= k <= k_max for k in ks)


def test_the_papers_run():
    """8 to 16 over 400 000 steps: 9 to 15 last 50 000 steps each, 8 and 16 half of that; ties go to the even k."""
    total = 400_000
    boundaries = [(k - 8 - 0.5) / 8 * total for k in range(9, 17)]  # where the line crosses k - 1/2
    assert boundaries[:2] == [25_000, 75_000]
    edges = [0, *(math.ceil(b) for b in boundaries), total]
    for k in range(8, 17):
        low, high = edges[k - 8], edges[k - 7]
        for step in {low + 1, (low + high) // 2, high - 1}:
            assert k_at(step, total, 8, 16) == k
    counts = Counter(k_at(step, 1600, 8, 16) for step in range(1600))
    assert sum(counts.values()) == 1600 and sorted(counts) == list(range(8, 17))
    assert all(abs(counts[k] - (100 if k in (8, 16) else 200)) <= 1 for k in counts)
    assert [k_at(step, 1600, 8, 16) for step in (0, 99, 101, 800, 1499, 1501, 1599)] == [8, 8, 9, 12, 15, 16, 16]


@given(bounds, st.integers(1, 300), st.integers(0, 300))
def test_linear_is_the_formula(limits, total, step):
    k_min, k_max = limits
    assert k_at(min(step, total), total, *limits) == round((k_max - k_min) * min(step, total) / total) + k_min


def test_cosine_and_exponential_values():
    assert [k_at(s, 4, 1, 17, "cosine") for s in range(5)] == [1, 3, 9, 15, 17]  # (1 - cos(pi t)) / 2: .146, .5, .854
    assert [k_at(s, 4, 1, 16, "exponential") for s in range(5)] == [1, 2, 4, 8, 16]
    assert [k_at(s, 4, 1, 17, "cosine_decrease") for s in range(5)] == [17, 15, 9, 3, 1]


@pytest.mark.parametrize("total", [5, 100, 1000, 12345])
def test_multistep_has_equal_stretches(total):
    for mode, stages in (("multistep", [1, 2, 4, 8, 16]), ("multistep_decrease", [16, 8, 4, 2, 1])):
        ks = [k_at(step, total, 1, 16, mode) for step in range(total)]
        assert ks == [stages[step * 5 // total] for step in range(total)]
        assert set(Counter(ks).values()) == {total // 5}


def test_multistep_ends_at_k_max_where_doubling_misses_it():
    assert [k_at(s, 4, 3, 16, "multistep") for s in range(5)] == [3, 6, 12, 16, 16]


def test_constant():
    assert {k_at(step, 10, 2, 7, "constant") for step in range(20)} == {7}


@given(bounds, st.integers(0, 10**6), st.integers(0, 99), st.integers(0, 24))
def test_random_is_pure_and_in_range(limits, step, seed, layer):
    state = random.getstate()
    k = k_at(step, 100, *limits, "random_per_layer", seed=seed, layer=layer)
    assert limits[0] <= k <= limits[1]
    assert k == k_at(step, 100, *limits, "random_per_layer", seed=seed, layer=layer)
    assert random.getstate() == state


def test_random_takes_every_k_about_equally_and_each_argument_counts():
    counts = Counter(k_at(step, 8000, 1, 8, "random_per_layer") for step in range(8000))
    assert sum((counts[k] - 1000) ** 2 / 1000 for k in range(1, 9)) < 29.9  # chi-square, 7 degrees, 99.99 %
    runs = [
        [k_at(step, 50, 1, 16, "random_per_layer", seed=seed, layer=layer) for step in range(50)]
        for seed, layer in ((0, 0), (1, 0), (0, 1), (0, 10), (10, 0))
    ]
    assert len({tuple(run) for run in runs}) == 5
    assert runs[0][:8] == [
        10,
        10,
        5,
        11,
        1,
        6,
        6,
        7,
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 10, 1, 2, "linaer"), ["mode", "'linaer'", *MODES]),
        ((0, 10, 0, 2), ["k_min is 0"]),
        ((0, 10, 3, 2), ["k_min is 3", "k_max is 2"]),
        ((-1, 10, 1, 2), ["step is -1"]),
        ((0, 0, 1, 2), ["total_steps", "0"]),
        ((0, 10, 1.5, 2), ["k_min is 1.5"]),
        ((0, 10, 1, 2.0), ["k_max is 2.0"]),
        ((0, 10, True, 2), ["k_min is True"]),
        ((0.5, 10, 1, 2), ["step is 0.5"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        k_at(*arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_random_is_one_k_per_model_or_one_per_layer():
    ranges = [(2, 16)] * 6
    per_model = [ks_at(step, 100, ranges, "random", seed=3) for step in range(50)]
    assert all(len(set(ks)) == 1 for ks in per_model) and len({ks[0] for ks in per_model}) > 5
    per_layer = [ks_at(step, 100, ranges, "random_per_layer", seed=3) for step in range(50)]
    assert sum(len(set(ks)) > 1 for ks in per_layer) > 45
    assert per_layer == [ks_at(step, 100, ranges, "random_per_layer", seed=3) for step in range(50)]
    assert per_layer != [ks_at(step, 100, ranges, "random_per_layer", seed=4) for step in range(50)]
    assert {k for ks in per_layer for k in ks} == set(range(2, 17))


def test_layers_of_different_sizes_have_ranges_of_their_own():
    assert ks_at(50, 100, [(2, 4), (8, 16)]) == [3, 12]


def test_the_releases_curves_from_8_to_16():
    """Values worked out from its formulas; our modes of the same names differ."""

    def at_quarters(mode: str) -> list[int]:
        return [k_at(step, 400_000, 8, 16, mode) for step in (0, 100_000, 200_000, 300_000, 399_999)]

    assert at_quarters("released_cosine") == [8, 9, 10, 13, 16]
    assert at_quarters("released_exponential") == [8, 12, 14, 15, 16]
    assert at_quarters("released_multistep") == [8, 8, 8, 8, 16]
    assert at_quarters("cosine")[1:4] == [9, 12, 15]
    assert at_quarters("exponential")[1:4] == [10, 11, 13]
    assert at_quarters("multistep")[1:4] == [8, 16, 16]


@given(bounds, st.integers(300, 100_000), st.floats(0, 1))
def test_the_releases_curves_are_its_formulas(limits, total, share):
    k_min, k_max = limits
    step = min(int(share * total), total - 1)
    falling = math.cos(math.pi * step / 2 / total)
    growing = {
        "released_cosine": k_max - (k_max - k_min) * falling,
        "released_cosine_decrease": k_min + (k_max - k_min) * falling,
        "released_exponential": k_max - (k_max - k_min) * 0.99 ** (step // (total // 300)),
        "released_multistep": min(max(2 ** (5 * step // total), k_min), k_max),
        "released_multistep_decrease": min(max(2 ** (4 - 5 * step // total), k_min), k_max),
    }
    for mode, value in growing.items():
        assert abs(k_at(step, total, k_min, k_max, mode) - value) <= 0.5 + 1e-9, mode
