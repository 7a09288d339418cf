"""Which of two values is better."""

import math

import pytest

from smoe.metrics import Metric

LOWER = Metric("bpc", "BPC", "bits per byte", "lower", nats=True)
HIGHER = Metric("accuracy", "Accuracy", "share of n examples", "higher")
NAN = float("nan")


@pytest.mark.parametrize("metric, better, worse", [(LOWER, 1.0, 2.0), (HIGHER, 0.9, 0.8)])
def test_better_goes_by_the_direction(metric, better, worse):
    assert metric.better(better, worse)
    assert not metric.better(worse, better)
    assert not metric.better(better, better), "the first of equal ones is kept"
    assert metric.better(better, None) and metric.better(worse, None)


@pytest.mark.parametrize("metric", [LOWER, HIGHER])
def test_nan_is_never_better_and_is_never_kept(metric):
    assert not metric.better(NAN, None)
    assert not metric.better(NAN, 1.0)
    kept = None
    for value in (NAN, 2.0, NAN, 2.0):
        kept = value if metric.better(value, kept) else kept
    assert kept == 2.0


def test_infinity_is_the_worst_loss():
    assert LOWER.better(1.0, math.inf) and not LOWER.better(math.inf, 1.0)


def test_it_is_shown_with_its_title():
    assert LOWER.shown({"bpc": 1.14857, "other": 3.0}) == "BPC 1.1486"


@pytest.mark.parametrize(("metric", "best"), [(LOWER, -math.inf), (HIGHER, math.inf)])
def test_a_value_that_is_not_finite_is_never_better(metric, best):
    assert not metric.better(best, None) and not metric.better(best, 0.5)
