"""CommonsenseQA: from the authors' JSON lines to ours, and every way in which a line can't be used."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from data.csqa.prepare import CSQA, convert
from data.fetch import LocalPath
from data.folder import sha256_of

# A folder with train_rand_split.jsonl and dev_rand_split.jsonl.
SOURCE = Path(os.environ.get("CSQA_SOURCE", Path(__file__).parents[3] / "shared/data/csqa"))


def question(number: int, answer: str = "B", **changes) -> dict:
    choices = [{"label": label, "text": f"{label.lower()} {number}"} for label in "ABCDE"]
    return {"answerKey": answer, "id": f"id-{number}", "question": {"choices": choices, "stem": f"What {number}?"}} | {
        **changes
    }


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    for part, count in (("train", 3), ("dev", 2)):
        lines = "".join(json.dumps(question(i)) + "\n" for i in range(count))
        (tmp_path / f"home/{part}_rand_split.jsonl").write_text(lines)
    return tmp_path / "home"


@pytest.fixture
def small(home, tmp_path):
    read = lambda path, folder: convert(path, folder, {"train": 3, "test": 2})  # noqa: E731
    (tmp_path / "converted").mkdir()
    read(home, tmp_path / "converted")
    sha256 = sha256_of(*(tmp_path / "converted" / file for file in CSQA.files.values()))
    return replace(CSQA, read=read, sha256=sha256)


def test_questions_become_json_lines(home, small, tmp_path):
    assert small.main(["--source", str(home), "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/test.jsonl").read_text().splitlines()]
    choices = ["a 1", "b 1", "c 1", "d 1", "e 1"]
    assert len(lines) == 2
    assert lines[1] == {"id": "id-1", "question": "What 1?", "choices": choices, "answer": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "dev_rand_split.jsonl: can't be read: "),
        ([], "dev_rand_split.jsonl has 0 questions, expected 2"),
        ([question(0), question(1, "F")], "line 2: answerKey is 'F', expected one of A, B, C, D, E"),
        ([{"id": "x"}], "dev_rand_split.jsonl, line 1: no question"),
        ([{**question(0), "question": {"stem": "x", "choices": []}}], "line 1: the choices are [], expected ['A',"),
        ([7], "line 1: 'int' object is not subscriptable"),
        ([question(2), question(3)], "SHA-256 is "),
    ],
)
def test_what_is_not_the_authors_is_one_line_and_leaves_nothing(content, message, home, small, tmp_path, capsys):
    file = home / "dev_rand_split.jsonl"
    file.unlink() if content is None else file.write_text("".join(json.dumps(row) + "\n" for row in content))
    assert small.main(["--source", str(home), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: csqa: source: {home}: ") and message in error, error
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not SOURCE.is_dir(), reason="no CommonsenseQA here; CSQA_SOURCE=FOLDER names it")
def test_the_real_questions(tmp_path):
    meta = CSQA.prepare(tmp_path, [LocalPath(SOURCE)])
    assert {split: part["examples"] for split, part in meta["splits"].items()} == {"train": 9741, "test": 1221}
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in (SOURCE / "dev_rand_split.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["choices"][line["answer"]] for line in lines] == [
        next(c["text"] for c in row["question"]["choices"] if c["label"] == row["answerKey"]) for row in rows
    ]
    assert CSQA.is_prepared(tmp_path, contents=True)
