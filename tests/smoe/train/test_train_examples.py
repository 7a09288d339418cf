"""Which examples each step has."""

import numpy as np
import pytest

from smoe.train.examples import Dealer


@pytest.mark.parametrize("grouped", [False, True])
def test_every_example_is_dealt_once_an_epoch_whatever_is_asked_first(grouped):
    lengths = np.random.default_rng(0).integers(1, 200, 1003)
    dealer = Dealer(1003, 8, seed=3, lengths=lengths if grouped else None)
    epochs = [[dealer.batch(step) for step in range(125 * epoch, 125 * epoch + 125)] for epoch in range(2)]
    for batches in epochs:
        dealt = np.concatenate(batches)
        assert {len(batch) for batch in batches} == {8} and len(set(dealt.tolist())) == 1000
    assert not np.array_equal(*map(np.concatenate, epochs))
    fresh = Dealer(1003, 8, seed=3, lengths=lengths if grouped else None)
    assert np.array_equal(fresh.batch(200), epochs[1][75]) and np.array_equal(fresh.batch(5), epochs[0][5])
    other = Dealer(1003, 8, seed=4, lengths=lengths if grouped else None)
    assert not np.array_equal(other.batch(5), epochs[0][5])
    assert dealer.where(200) == "epoch 1, batch 75 of the data"


def test_grouped_batches_are_padded_little_and_come_in_no_order_of_length():
    lengths = np.random.default_rng(0).integers(1, 200, 4000)
    padded = {}
    for grouped in (False, True):
        dealer = Dealer(4000, 8, seed=0, lengths=lengths if grouped else None)
        batches = [lengths[dealer.batch(step)] for step in range(500)]
        padded[grouped] = sum(8 * batch.max() for batch in batches) / lengths.sum()
    assert padded[False] > 1.6 and padded[True] < 1.05
    means = [batch.mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(500))[0, 1]) < 0.15
    assert min(means) < 10 and max(means) > 190  # of the first 50 batches alone it would be the same


def test_without_lengths_the_order_is_that_of_earlier_versions():
    order = np.random.default_rng([7, 1]).permutation(30)
    dealer = Dealer(30, 4, seed=7)
    assert np.array_equal(dealer.batch(7 + 2), order[8:12])
