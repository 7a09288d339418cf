"""The floors of labelled sentences: what counting words alone gets right."""

import random
import sys

import numpy as np
import pytest

from smoe.train.sentence_floors import floor_notes, sentence_floors


@pytest.fixture(scope="module")
def splits():
    rng = random.Random(0)

    def row():
        label = int(rng.random() < 0.7)
        words = [
            rng.choice(("good !", "fine") if rng.random() < 0.6 + 0.3 * (label - 0.5) else ("bad", "so-so"))
            for _ in range(3)
        ]
        return " ".join(words), label

    return {"train": [row() for _ in range(80)], "valid": [row() for _ in range(50)]}


def test_a_bag_of_words_is_logistic_regression_on_counts(splits):
    found = sentence_floors(splits)["floors"]
    vocabulary = sorted({word for text, _ in splits["train"] for word in text.split()})

    def counts(rows):
        return np.array([[text.split().count(word) for word in vocabulary] + [1.0] for text, _ in rows])

    # By Newton's method: the loss of scikit-learn's defaults, half the squared weights and the log loss, its sum.
    x, y = counts(splits["train"]), np.array([label for _, label in splits["train"]])
    weights, penalty = np.zeros(x.shape[1]), np.diag([1.0] * len(vocabulary) + [0.0])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ weights))
        weights -= np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + penalty, x.T @ (p - y) + penalty @ weights)
    right = (counts(splits["valid"]) @ weights > 0) == [label for _, label in splits["valid"]]
    assert found["bag_of_words"]["valid"] == pytest.approx(right.mean())
    ones = sum(label for _, label in splits["valid"]) / 50
    assert found["most_frequent_label"]["valid"] == ones and sum(y) > 40 and found["bag_of_words"]["valid"] != ones


def test_without_scikit_learn_the_record_says_which_floor_is_missing(splits, monkeypatch):
    for name in ("sklearn", "sklearn.feature_extraction.text", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    found = sentence_floors(splits)
    assert found["floors"].keys() == {"most_frequent_label"}
    assert found["floors_missing"] == {"bag_of_words": "needs scikit-learn; pip install scikit-learn"}
    assert floor_notes(found, "valid")[1] == "no floor bag_of_words: needs scikit-learn; pip install scikit-learn"


def test_one_label_is_no_error():
    found = sentence_floors({"train": [("a", 1), ("b", 1)], "valid": [("a", 0)]})
    assert "bag_of_words" in found["floors_missing"] and found["floors"]["most_frequent_label"] == {"valid": 0.0}
