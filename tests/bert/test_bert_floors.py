"""Floors by counting, against a naive count of every token and every sum over the vocabulary."""

import math

import numpy as np
import pytest

from bert import floors as floors_module
from bert.data import Vocabulary, evaluation_batches
from bert.floors import HIDDEN, PSEUDO_COUNTS, floors, masked_tokens

SIZE = 12
VOCABULARY = Vocabulary(size=SIZE, pad=0, unknown=1, start=2, end=3, mask=4)


def text(count, seed, length=16):
    """Sequences in which a token often follows from the one before."""
    rng = np.random.default_rng(seed)
    data = np.empty((count, length), dtype=np.uint16)
    data[:, 0], data[:, 1], data[:, -1] = 2, rng.integers(5, SIZE, count), 3
    for i in range(2, length - 1):
        data[:, i] = np.where(rng.random(count) < 0.7, 5 + (data[:, i - 1] * 3 + 1) % 7, rng.integers(5, SIZE, count))
    return data


TRAIN = text(150, 0)
SPLITS = {split: text(30, seed) for split, seed in (("valid", 1), ("test", 2))}


def batches(split, batch_size=7, share=0.3):
    return evaluation_batches(SPLITS[split], VOCABULARY, batch_size, share)


def naive(split, one, both):
    """The four floors of a split, with whole distributions over the vocabulary."""
    rows = TRAIN.tolist()
    flat = [token for row in rows for token in row if token not in VOCABULARY.never_masked]
    unigram = np.array([(flat.count(t) + 1) / (len(flat) + SIZE) for t in range(SIZE)])
    pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
    triples = [triple for row in rows for triple in zip(row, row[1:], row[2:], strict=False)]

    def share(found, pseudo, prior):
        counts = np.bincount(np.array(found, dtype=int), minlength=SIZE)
        return (counts + pseudo * prior) / (len(found) + pseudo)

    def two_sided(left, right):
        after = [] if left is None else [share([b for a, b in pairs if a == left], one, unigram)]
        before = [] if right is None else [share([a for a, b in pairs if b == right], one, unigram)]
        prior = np.mean([*after, *before] or [unigram], axis=0)
        return share([m for a, m, b in triples if (a, b) == (left, right)], both, prior)

    def seeing(chances, shown):
        if shown == VOCABULARY.mask:
            return chances
        showing = np.full(SIZE, 0.1 / SIZE)
        showing[shown] += 0.1
        return chances * showing / (chances * showing).sum()

    bits = {"unigram": [], "two_sided_bigram": [], "unigram_shown": [], "two_sided_bigram_shown": []}
    for batch in batches(split):
        for inputs, positions, targets in zip(*(part.tolist() for part in batch), strict=True):
            for position, target in zip(positions, targets, strict=True):
                left, right = (None if p in positions else inputs[p] for p in (position - 1, position + 1))
                for name, chances in (("unigram", unigram), ("two_sided_bigram", two_sided(left, right))):
                    bits[name].append(-math.log2(chances[target]))
                    bits[f"{name}_shown"].append(-math.log2(seeing(chances, inputs[position])[target]))
    return {name: sum(values) / len(values) for name, values in bits.items()}


def test_floors_are_those_of_a_naive_count(monkeypatch):
    monkeypatch.setattr(floors_module, "PSEUDO_COUNTS", (1.0, 8.0))
    monkeypatch.setattr(floors_module, "CHUNK", 100)  # so that train is counted in several parts
    got = floors(TRAIN, {split: masked_tokens(batches(split)) for split in SPLITS}, VOCABULARY)
    chosen = min(
        ((one, both) for one in (1.0, 8.0) for both in (1.0, 8.0)),
        key=lambda pair: naive("valid", *pair)["two_sided_bigram"],
    )
    for split in SPLITS:
        expected = naive(split, *chosen)
        assert {name: bits[split] for name, bits in got.items()} == pytest.approx(expected, abs=1e-9)
    assert got["two_sided_bigram"]["test"] < got["unigram"]["test"] - 0.3
    assert got["unigram_shown"]["test"] < got["unigram"]["test"]


def test_masked_tokens_are_those_of_the_batches_whatever_their_size():
    whole, parts = masked_tokens(batches("valid", 30)), masked_tokens(batches("valid", 4))
    assert all(map(np.array_equal, whole, parts))
    (batch,) = batches("valid", 30)
    assert np.array_equal(whole.target, batch.targets.flatten())
    assert (whole.left == HIDDEN).sum() == (np.diff(batch.positions.numpy(), axis=1) == 1).sum()
    original = SPLITS["valid"].astype(np.int64)
    seen, places = whole.left != HIDDEN, batch.positions.numpy()
    assert np.array_equal(whole.left[seen], original[np.arange(30)[:, None], places - 1].flatten()[seen])


def test_what_is_outside_a_sequence_is_hidden():
    """As of a block that was cut, whose sequences may start and end with a token to predict."""
    cut = SPLITS["valid"][:, 4:8]
    (batch,) = evaluation_batches(cut, VOCABULARY, 30, 0.25)
    left, right, _, _ = masked_tokens([batch])
    places = batch.positions.numpy().flatten()
    assert {0, 3} < set(places)
    assert np.array_equal(left == HIDDEN, places == 0) and np.array_equal(right == HIDDEN, places == 3)
    assert np.array_equal(right[places == 0], cut[places == 0, 1])


def test_a_long_train_is_counted_in_part(monkeypatch):
    splits = {"valid": masked_tokens(batches("valid"))}
    monkeypatch.setattr(floors_module, "MAX_TOKENS", TRAIN.size // 2)
    assert floors(TRAIN, splits, VOCABULARY) == floors(TRAIN[::2].copy(), splits, VOCABULARY)


def test_keys_of_the_papers_vocabularies_fit(monkeypatch):
    huge = Vocabulary(size=50265, pad=1, unknown=3, start=0, end=2, mask=50264)
    train = np.array([[0, 50263, 50262, 50263, 2]] * 3, dtype=np.uint16)
    masked = floors_module.Masked(*(np.array([token]) for token in (50263, 50263, 50264, 50262)))
    bits = floors(train, {"valid": masked}, huge)["two_sided_bigram"]["valid"]
    pseudo, unigram = min(PSEUDO_COUNTS), (3 + 1) / (9 + huge.size)
    one = (3 + pseudo * unigram) / (6 + pseudo)  # three of the six tokens after 50263 are 50262, and of those before
    assert bits == pytest.approx(-math.log2((3 + pseudo * one) / (3 + pseudo)), abs=1e-6)
