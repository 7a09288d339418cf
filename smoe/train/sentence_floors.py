"""What needs no model of language on labelled sentences: the most frequent label, and a bag of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Labelled = Sequence[tuple[str, int]]


def sentence_floors(splits: Mapping[str, Labelled]) -> dict[str, Any]:
    """``floors`` of a record, the share of each split but train that is right, by floor.

    ``most_frequent_label``: of train. ``bag_of_words``: logistic regression on how often each word (what stands between
    blanks) is in the sentence, by scikit-learn as it comes. Without scikit-learn ``floors_missing`` says so.
    """
    train, others = splits["train"], {name: rows for name, rows in splits.items() if name != "train"}
    label = Counter(label for _, label in train).most_common(1)[0][0]
    most = {name: sum(own == label for _, own in rows) / len(rows) for name, rows in others.items()}
    record: dict[str, Any] = {"floors": {"most_frequent_label": most}}
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return record | {"floors_missing": {"bag_of_words": "needs scikit-learn; pip install scikit-learn"}}
    words = CountVectorizer(token_pattern=r"\S+")
    try:
        counts = words.fit_transform([text for text, _ in train])
        model = LogisticRegression(max_iter=1000).fit(counts, [label for _, label in train])
    except ValueError as error:  # no words at all, or one label
        return record | {"floors_missing": {"bag_of_words": " ".join(str(error).split())}}
    record["floors"]["bag_of_words"] = {
        name: float(model.score(words.transform([text for text, _ in rows]), [label for _, label in rows]))
        for name, rows in others.items()
    }
    return record


def floor_notes(record: Mapping[str, Any], split: str) -> list[str]:
    """The floors of a record as lines for a training's output."""
    shares = ", ".join(f"{name} {of[split]:.4f}" for name, of in record["floors"].items())
    missing = [f"no floor {name}: {why}" for name, why in record.get("floors_missing", {}).items()]
    return [f"floors on {split}: {shares}", *missing]
