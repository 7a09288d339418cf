"""Math word problems in the folds of Patel et al. 2021: what data/asdiv_a, data/mawps and data/svamp share.

A csv of the home has a row per problem. In its text the i-th number is written ``number<i>``; ``Numbers`` has them in
order, ``Equation`` is the solution in prefix form over these slots, ``Answer`` what it comes to. Each fold becomes
FOLD-train.jsonl and FOLD-test.jsonl, with lines such as

    {"question": "... number0 ... number1 ...", "numbers": [8.0, 2.0], "equation": "- number0 number1", "answer": 6.0}

meta.json says of each file how many problems it has, and for how many of them the equation gives the answer, which
bounds what a model of these equations can solve.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bert import equations
from data.dataset import DataSet
from data.errors import SourceError, printable
from data.fetch import Folder, Url
from data.unpack import read_file, text_of

TABLES = {"train": "train.csv", "test": "dev.csv"}  # the home's names
COLUMNS = ("Question", "Numbers", "Equation", "Answer")
_COMMIT = "689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
_HOMES = (
    f"https://raw.githubusercontent.com/arkilpatel/SVAMP/{_COMMIT}/data",
    f"https://cdn.jsdelivr.net/gh/arkilpatel/SVAMP@{_COMMIT}/data",
)
_MAX_BYTES = 10_000_000  # of a csv


def word_problems(name: str, folder: Path, folds: Mapping[str, str], sha256: str) -> DataSet:
    """The data set ``name``. ``folds``: the home's folder of each fold, e.g. ``{"0": "cv_mawps/fold0"}``."""
    tables = [f"{place}/{table}" for place in folds.values() for table in TABLES.values()]
    return DataSet(
        name=name,
        folder=folder,
        files={f"{fold}-{split}": f"{fold}-{split}.jsonl" for fold in folds for split in TABLES},
        sha256=sha256,
        sources=tuple(Folder({table: Url(f"{home}/{table}", _MAX_BYTES) for table in tables}) for home in _HOMES),
        read=lambda path, out: convert(path, out, folds),
        local=f"the folder data of github.com/arkilpatel/SVAMP, with {tables[0]} and the other folds",
    )


def convert(path: Path, folder: Path, folds: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Write the folds in the folder ``path`` to ``folder``; return what meta.json says of each file.

    Raises SourceError for a csv that is missing, empty, or has a problem that can't be used.
    """
    facts = {}
    for fold, place in folds.items():
        for split, table in TABLES.items():
            problems = list(read_table(path / place / table, f"{place}/{table}"))
            with open(folder / f"{fold}-{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
            solved = sum(equations.solves(p["equation"].split(), p["numbers"], p["answer"]) for p in problems)
            facts[f"{fold}-{split}"] = {"examples": len(problems), "solved_by_their_equation": solved}
    return facts


def read_table(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The problems of the csv at ``path``, which messages call ``name``. Raises SourceError."""
    text = text_of(read_file(path, _MAX_BYTES), name)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
            raise SourceError(f"{name} has no column {missing[0]}; it must have {', '.join(COLUMNS)}")
        for number, row in enumerate(rows, start=1):
            try:
                yield _problem(row)
            except ValueError as error:
                raise SourceError(f"{name}, problem {number}: {printable(error, 200)}") from None
    except csv.Error as error:
        raise SourceError(f"{name}, after problem {number}: {printable(error)}") from None
    if not number:
        raise SourceError(f"{name} has no problems")


def _problem(row: Mapping[str, str | None]) -> dict[str, Any]:
    """A row as it is written. ValueError for one that no model could learn from or be measured on."""
    question, numbers, equation, answer = (row[column] or "" for column in COLUMNS)
    values = [_number("Numbers", word) for word in numbers.split()]
    equations.check_slots(question, len(values))
    try:
        equations.check(equation.split(), len(values))
    except equations.EquationError as error:
        raise ValueError(f"Equation: {error}") from None
    return {
        "question": question,
        "numbers": values,
        "equation": " ".join(equation.split()),
        "answer": _number("Answer", answer),
    }


def _number(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column} has {text!r}, expected a number")
    return value
