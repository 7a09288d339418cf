"""What counting alone reaches on the very masked tokens that a model is evaluated on, in mean bits per token.

- ``unigram``: how frequent the token is in train.
- ``two_sided_bigram``: its left and right neighbour. Counts of three tokens in a row, smoothed by the mean of what each
  neighbour says alone, which the unigram smooths in turn (pseudo-counts: the best on valid). A neighbour that is to be
  predicted as well says nothing.
- ``unigram_shown``, ``two_sided_bigram_shown``: the same, given what is shown in the token's place, as a model is.
  BERT's masking leaves one token in ten as it is and replaces another by a random one, so what is shown, if it is not
  the mask, is right every second time. A model at ``unigram_shown`` has learned nothing from the tokens around.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bert.data import MaskedBatch, Vocabulary

PSEUDO_COUNTS = tuple(2.0**power for power in range(11))
MAX_TOKENS = 20_000_000  # of train that are counted, in sequences spread evenly over it
CHUNK = 1 << 22  # tokens that are counted at a time
HIDDEN = -1


class Masked(NamedTuple):
    """Tokens to predict: the neighbours of each (or HIDDEN), what is shown in its place, what it is; (n,) int64."""

    left: np.ndarray
    right: np.ndarray
    shown: np.ndarray
    target: np.ndarray


def masked_tokens(batches: Iterable[MaskedBatch]) -> Masked:
    """Those of evaluation batches, in order. A neighbour outside the sequence is HIDDEN too."""
    found = []
    for batch in batches:
        inputs, positions, targets = (part.numpy() for part in batch)
        rows, columns = np.nonzero(targets >= 0)
        places = positions[rows, columns]
        around = np.pad(inputs, ((0, 0), (1, 1)), constant_values=HIDDEN)  # place p is in column p + 1
        around[rows, places + 1] = HIDDEN
        found.append((around[rows, places], around[rows, places + 2], inputs[rows, places], targets[rows, columns]))
    return _join(found)


def floors(train: np.ndarray, splits: dict[str, Masked], vocabulary: Vocabulary) -> dict[str, dict[str, float]]:
    """Bits by floor and split. ``train`` is (sequences, T) token ids; ``splits`` has ``valid`` at least.

    Only what ``splits`` ask for is counted, so the memory does not grow with train or with the vocabulary.
    """
    asked = _join(splits.values())
    chances = _Chances(train, asked, vocabulary)
    ends = np.cumsum([len(masked.target) for masked in splits.values()])
    even = 1 / vocabulary.size

    def bits(target: np.ndarray, shown: np.ndarray | None = None) -> dict[str, float]:
        if shown is not None:
            # Bayes: a token is shown as it is as often as it is replaced by one of the vocabulary, each as often.
            informed = target * ((asked.shown == asked.target) + even) / (shown + even)
            target = np.where(asked.shown == vocabulary.mask, target, informed)
        parts = np.split(-np.log2(target), ends[:-1])
        return {split: float(part.mean()) for split, part in zip(splits, parts, strict=True)}

    best = min(itertools.product(PSEUDO_COUNTS, repeat=2), key=lambda pair: bits(chances.two_sided(*pair)[0])["valid"])
    known = {"unigram": chances.unigram, "two_sided_bigram": chances.two_sided(*best)}
    blind = {name: bits(right) for name, (right, _) in known.items()}
    return blind | {f"{name}_shown": bits(right, shown) for name, (right, shown) in known.items()}


def _join(parts: Iterable[tuple[np.ndarray, ...]]) -> Masked:
    return Masked(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class _Chances:
    """Probabilities (2, n): of the tokens that are right, and of those that are shown, by what train has."""

    def __init__(self, train: np.ndarray, asked: Masked, vocabulary: Vocabulary) -> None:
        left, right, token = asked.left, asked.right, np.stack([asked.target, asked.shown])
        train = train[:: -(-train.size // MAX_TOKENS)]
        special = np.array(vocabulary.never_masked)
        total = train.size - _count(train, (special,)).sum()
        self.unigram = (_count(train, (token,)) * ~np.isin(token, special) + 1) / (total + vocabulary.size)
        self.left, self.right = left != HIDDEN, right != HIDDEN
        self.after, self.after_left = _count(train, (left, None)), _count(train, (left, token))
        self.before, self.before_right = _count(train, (None, right)), _count(train, (token, right))
        self.between, self.in_a_row = _count(train, (left, None, right)), _count(train, (left, token, right))

    def two_sided(self, one: float, both: float) -> np.ndarray:
        """With the pseudo-counts for one neighbour and for both."""
        from_left = (self.after_left + one * self.unigram) / (self.after + one)
        from_right = (self.before_right + one * self.unigram) / (self.before + one)
        alone = np.where(self.left, from_left, from_right)  # the unigram if neither is there: the counts are 0 then
        mean = np.where(self.left & self.right, (from_left + from_right) / 2, alone)
        return (self.in_a_row + both * mean) / (self.between + both)


def _count(train: np.ndarray, pattern: tuple[np.ndarray | None, ...]) -> np.ndarray:
    """How often each pattern of adjacent tokens occurs in the rows of ``train``; None stands for any token."""
    wanted = {offset: tokens for offset, tokens in enumerate(pattern) if tokens is not None}
    base = int(max(train.max(), *(tokens.max() for tokens in wanted.values()))) + 2  # HIDDEN becomes 0
    keys, places = np.unique(_keys(list(wanted.values()), base), return_inverse=True)
    counts = np.zeros(len(keys), dtype=np.int64)
    width, rows = train.shape[1] - len(pattern) + 1, max(CHUNK // train.shape[1], 1)
    for start in range(0, len(train), rows):
        part = train[start : start + rows].astype(np.int64)
        seen = _keys([part[:, offset : offset + width] for offset in wanted], base).ravel()
        found = np.searchsorted(keys, seen).clip(max=len(keys) - 1)
        counts += np.bincount(found[keys[found] == seen], minlength=len(keys))
    return counts[places]


def _keys(columns: list[np.ndarray], base: int) -> np.ndarray:
    """One number per tuple of tokens."""
    return functools.reduce(lambda keys, column: keys * base + (column + 1), columns, np.int64(0))
