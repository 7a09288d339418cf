"""Whether an answer to a question is right, as HotpotQA's and SQuAD's own evaluation decides it."""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SAID = ("yes", "no", "noanswer")


def normalized(answer: str) -> str:
    """Lower case, without punctuation (of ASCII), articles and superfluous blanks."""
    bare = answer.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def is_exact(answer: str, right: str) -> bool:
    """Whether both are the same but for what :func:`normalized` takes away."""
    return normalized(answer) == normalized(right)


def f1(answer: str, right: str) -> float:
    """Harmonic mean of the shares of common words in each, 0 to 1; yes and no are right or wrong as a whole."""
    ours, theirs = normalized(answer), normalized(right)
    if ours != theirs and (ours in _SAID or theirs in _SAID):
        return 0.0
    words, right_words = ours.split(), theirs.split()
    common = (Counter(words) & Counter(right_words)).total()
    return 2 * common / (len(words) + len(right_words)) if common else 0.0
