"""HotpotQA: from the authors' format, whole or a sample, to JSON lines, and every way in which a file can't be used."""

import json
import lzma
import os
from pathlib import Path

import pytest

from data.hotpotqa import prepare
from data.hotpotqa.prepare import PARTS, SUBQUESTIONS, find_answer, main

# A folder with questions in HotpotQA's format, and the file of MoreHopQA.
SOURCE = Path(os.environ.get("HOTPOTQA_SOURCE", Path(__file__).parents[3] / "shared/data/hotpotqa"))
MOREHOPQA = Path(os.environ.get("MOREHOPQA_SOURCE", SOURCE.parent / "hotpot_subq" / SUBQUESTIONS))


def question(i: int, **changes) -> dict:
    context = [["Ann", ["Ann is old.", f" She wrote Book {i}."]], ["Bob", [f"Bob likes Book {i}", " a lot."]]]
    facts = [["Bob", 0]] if i % 2 else [["Ann", 1], ["Gone", 0]]
    row = {"_id": f"id{i}", "question": f"Which book, {i}?", "answer": f"Book {i}", "type": "bridge", "level": "hard"}
    return row | {"supporting_facts": facts, "context": context} | changes


def composed(i: int, **changes) -> dict:
    parts = [
        {"question": f"Who wrote {i}?", "answer": "Ann", "paragraph_support_title": "Ann"},
        {"question": "What does Bob like?", "answer": f"book {i}", "paragraph_support_title": "Bob"},
        {"question": "How many letters?", "answer": "4", "paragraph_support_title": ""},
    ]
    row = {"_id": f"id{i}_7", "question": "x", "answer": "4", "previous_question": f"Whose, {i}?"}
    row |= {"previous_answer": f"Book {i}", "question_decomposition": parts}
    return row | {"context": question(i)["context"]} | changes


@pytest.fixture
def home(tmp_path):
    """Two samples, one in JSON lines and packed, and questions with their parts; id1 is in these too."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([question(i) for i in range(30)]))
    lines = "".join(json.dumps(question(i, answer="yes")) + "\n" for i in range(25, 40))
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (folder / "SOURCE.txt").write_text("not questions")
    (folder / SUBQUESTIONS).write_text(json.dumps([composed(1), composed(1), composed(50)]))
    return folder


def run(home: Path, out: Path, *flags: object) -> int:
    return main(["--source", str(home), "--out", str(out), *map(str, flags)])


def rows_of(out: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def test_a_sample_is_split_by_the_hash_of_its_ids(home, tmp_path):
    out = tmp_path / "out"
    assert run(home, out) == 0
    parts = json.loads((out / "meta.json").read_text())["splits"]
    rows = {split: rows_of(out, split) for split in parts}
    train, test = ({row["question"] for row in rows[split]} for split in ("train", "test"))
    assert train.isdisjoint(test) and 3 <= len(test) <= 20
    # 40 questions, of which id1 is left out of train for it is one of those that are composed.
    assert train | test == {question(i)["question"] for i in range(40)} - ({question(1)["question"]} - test)
    for split in parts:
        assert parts[split]["examples"] == sum(parts[split]["files"].values()) == len(rows[split])
    assert parts["train"]["files"]["a.json"] + parts["test"]["files"]["a.json"] in (29, 30)
    assert parts["train"]["yes_or_no"] + parts["test"]["yes_or_no"] == 10
    everywhere = sum(parts[split]["with_all_gold_paragraphs"] for split in ("train", "test"))
    assert everywhere in (19, 20)  # those with an odd number
    assert parts["multi_hop"]["files"] == {SUBQUESTIONS: 2} and parts["single_hop"]["answerable"] == 4
    # The same again, whatever else is in the folder or in which order.
    (home / "a.json").rename(home / "c.json")
    assert run(home, tmp_path / "again") == 0
    again = {split: {row["question"] for row in rows_of(tmp_path / "again", split)} for split in ("train", "test")}
    assert again == {"train": train, "test": test}


def test_rows_say_where_the_answer_is(home, tmp_path):
    out = tmp_path / "out"
    assert run(home, out) == 0
    rows = {row["question"]: row for split in ("train", "test") for row in rows_of(out, split)}
    text = "Ann\nAnn is old. She wrote Book {0}.\nBob\nBob likes Book {0} a lot."
    for i in (2, 3):
        row = rows[f"Which book, {i}?"]
        first = row["context"].index(f"Book {i}")
        place = first if i == 2 else row["context"].index(f"Book {i}", first + 1)
        assert row["context"] == text.format(i) and row["titles"] == ["Ann", "Bob"]
        assert row["span"] == [place, place + 6]
    assert rows["Which book, 39?"]["span"] is None
    multi, single = (rows_of(out, split) for split in ("multi_hop", "single_hop"))
    assert [row["question"] for row in multi] == ["Whose, 1?", "Whose, 50?"]
    assert [row["answer"] for row in single] == ["Ann", "book 1", "Ann", "book 50"]
    start, end = single[1]["span"]
    assert (
        single[1]["context"][start - 4 : end] == "ikes Book 1"[1:]
        or single[1]["context"][start - 6 : end] == "likes Book 1"
    )


def test_the_best_place_of_an_answer():
    text = "no one knows No. No"
    assert find_answer(text, "No", []) == [13, 15]  # as it is written, a whole word
    assert find_answer(text, "No", [(0, 6)]) == [0, 2]  # what supports the answer comes first
    assert find_answer(text, "o", []) is None
    assert find_answer("C++ (a)", "c++", []) == [0, 3]


def test_other_data_takes_the_place_of_what_is_there(home, tmp_path):
    out = tmp_path / "out"
    assert run(home, out) == 0
    before = (out / "meta.json").read_bytes()
    (home / "a.json").unlink()
    assert run(home, out) == 0 and (out / "meta.json").read_bytes() == before  # from the same source
    other = home.rename(tmp_path / "other")
    assert run(other, out) == 0
    parts = json.loads((out / "meta.json").read_text())["splits"]
    assert parts["train"]["files"].keys() == {"b.jsonl.xz"}
    (out / "test.jsonl").write_text("x" * parts["test"]["bytes"])
    assert not prepare.hotpotqa().is_prepared(out, contents=True)


def test_other_single_hop_questions_take_the_place_of_what_is_there(home, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "mine.json"
    file.write_text(json.dumps([composed(2)]))
    assert run(home, out) == 0
    assert run(home, out, "--subquestions", file) == 0
    assert [row["question"] for row in rows_of(out, "multi_hop")] == ["Whose, 2?"]
    before = (out / "meta.json").stat().st_mtime_ns
    assert run(home, out, "--subquestions", file) == 0
    assert (out / "meta.json").stat().st_mtime_ns == before
    file.write_text(json.dumps([composed(3)]))
    assert run(home, out, "--subquestions", file) == 0
    assert [row["question"] for row in rows_of(out, "multi_hop")] == ["Whose, 3?"]
    capsys.readouterr()
    assert run(home, out, "--subquestions", tmp_path / "none.json") == 2
    assert "there is no none.json" in capsys.readouterr().err and rows_of(out, "multi_hop")
    assert run(home, out) == 0  # without the flag, the source's own again
    assert rows_of(out, "multi_hop")[0]["question"] == "Whose, 1?"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", [question(0), question(1, answer=3)], "a.json, question 2: answer is 3, expected text"),
        ("a.json", [{"_id": "x"}], "a.json, question 1: no supporting_facts"),
        ("a.json", [question(0, context=[["A", [5]]])], "a paragraph or its title is 5, not text"),
        ("a.json", [7], "a.json, question 1: 'int' object is not subscriptable"),
        ("a.json", b'[{"_id": ', "a.json, question 1: "),
        ("a.json", b"[", "a.json has no questions"),
        ("a.json", json.dumps([question(0)]).encode()[:-1], "a.json ends in the middle"),
        ("a.json", b"\xff", "a.json is not UTF-8 text (byte 0)"),
        (SUBQUESTIONS, [composed(1, question_decomposition=[])], f"{SUBQUESTIONS}, question 1: "),
        (SUBQUESTIONS, None, "name a file with --subquestions"),
    ],
)
def test_what_can_not_be_used_is_one_line_and_leaves_nothing(file, content, message, home, tmp_path, capsys):
    (home / file).unlink()
    if content is not None:
        (home / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert run(home, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: hotpotqa: source: {home}: ") and message in error, error
    assert list((tmp_path / "out").iterdir()) == []


def test_the_authors_two_files_must_be_theirs(home, tmp_path, capsys, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    for part, numbers in ((PARTS["train"], range(6)), (PARTS["test"], range(6, 9))):
        (own / part).write_text(json.dumps([question(i) for i in numbers]))
    flags = ("--subquestions", home / SUBQUESTIONS)
    assert run(own, tmp_path / "out", *flags) == 2
    assert f"{PARTS['train']} has not the SHA-256 of the authors' file" in capsys.readouterr().err
    monkeypatch.setattr(prepare, "SHA256", {split: prepare.sha256_of(own / part) for split, part in PARTS.items()})
    assert run(own, tmp_path / "out", *flags) == 0
    parts = json.loads((tmp_path / "out/meta.json").read_text())["splits"]
    assert [parts[split]["files"] for split in ("train", "test")] == [{PARTS["train"]: 5}, {PARTS["test"]: 3}]


@pytest.mark.skipif(not SOURCE.is_dir(), reason="no HotpotQA here; HOTPOTQA_SOURCE=FOLDER names it")
def test_real_questions(tmp_path):
    assert run(SOURCE, tmp_path, "--subquestions", MOREHOPQA) == 0
    rows = [row for split in ("train", "test") for row in rows_of(tmp_path, split)]
    assert len(rows) > 100
    for row in rows:
        if row["span"]:
            start, end = row["span"]
            assert row["context"][start:end].lower() == row["answer"].strip().lower()
    # Those that have no place are not there as the answer is written.
    missing = [row for row in rows if row["span"] is None and row["answer"] not in ("yes", "no")]
    assert not any(f" {row['answer']} " in row["context"] for row in missing)
    derived = MOREHOPQA.with_name("subq_derived.jsonl")
    if derived.exists():
        theirs = [json.loads(line) for line in derived.read_text().splitlines()]
        multi, single = (rows_of(tmp_path, split) for split in ("multi_hop", "single_hop"))
        assert [(row["question"], row["answer"]) for row in multi] == [(t["question"], t["answer"]) for t in theirs]
        pairs = [(t[f"sub_question_{n}"], t[f"sub_answer_{n}"]) for t in theirs for n in (1, 2)]
        assert [(row["question"], row["answer"]) for row in single] == pairs
