"""CSQA, CommonsenseQA 1.11: questions with five choices that common sense tells apart, in the authors' random split.

    python data/csqa/prepare.py [--source FOLDER] [--out DIR] [--force] [--verify]

Writes train.jsonl (9741 questions), test.jsonl (1221, the authors' dev: the answers of their test split are not public)
and meta.json (examples, SHA-256, where it came from). A line is

    {"id": "...", "question": "...", "choices": ["...", "...", "...", "...", "..."], "answer": 0}

Does nothing when the files are already there.

Talmor et al. 2019, "CommonsenseQA: A Question Answering Challenge Targeting Commonsense Knowledge".
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.dataset import DataSet
from data.errors import SourceError, printable
from data.fetch import Folder, Url
from data.unpack import read_file

PARTS = {"train": "train_rand_split.jsonl", "test": "dev_rand_split.jsonl"}  # the authors' names
EXAMPLES = {"train": 9741, "test": 1221}
LABELS = ["A", "B", "C", "D", "E"]
_MAX_BYTES = 10_000_000
_HOMES = (
    "https://s3.amazonaws.com/commensenseqa",
    "https://raw.githubusercontent.com/ezelikman/STaR/6ffd3c4743da6c7a7369834c434359d9f7e0ac38/commonsenseqa",
)


def convert(path: Path, folder: Path, examples: Mapping[str, int] = EXAMPLES) -> dict[str, dict[str, int]]:
    """Write the parts in the folder ``path`` to SPLIT.jsonl in ``folder``; return each one's examples.

    Raises SourceError for a part that is missing, has a bad line, or does not have as many ``examples``.
    """
    for split, part in PARTS.items():
        questions = list(read_part(path / part, part))
        if len(questions) != examples[split]:
            raise SourceError(f"{part} has {len(questions)} questions, expected {examples[split]}")
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    return {split: {"examples": count} for split, count in examples.items()}


def read_part(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The questions of the file at ``path``, which messages call ``name``. Raises SourceError."""
    try:
        lines = b"".join(read_file(path, _MAX_BYTES)).splitlines()
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            yield _question(json.loads(line))
        except KeyError as error:
            raise SourceError(f"{name}, line {number}: no {error.args[0]}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise SourceError(f"{name}, line {number}: {printable(error, 200)}") from None


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, answer = row["question"]["choices"], row["answerKey"]
    if (labels := [choice["label"] for choice in choices]) != LABELS:
        raise ValueError(f"the choices are {labels}, expected {LABELS}")
    if answer not in LABELS:
        raise ValueError(f"answerKey is {answer!r}, expected one of {', '.join(LABELS)}")
    question, texts = row["question"]["stem"], [choice["text"] for choice in choices]
    if not all(isinstance(text, str) for text in (question, *texts)):
        raise ValueError("the question or a choice is not text")
    return {"id": row["id"], "question": question, "choices": texts, "answer": LABELS.index(answer)}


CSQA = DataSet(
    name="csqa",
    folder=Path(__file__).resolve().parent,
    files={split: f"{split}.jsonl" for split in PARTS},
    sha256="c6c89c5f72c7f052ba6cb6608c2f5e822c4513618afec32db73a173e0f0c52c0",
    sources=tuple(Folder({part: Url(f"{home}/{part}", _MAX_BYTES) for part in PARTS.values()}) for home in _HOMES),
    read=convert,
    local="a folder with train_rand_split.jsonl and dev_rand_split.jsonl",
)

if __name__ == "__main__":
    sys.exit(CSQA.main())
