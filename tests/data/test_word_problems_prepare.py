"""Word problems: from the home's csv folds to JSON lines, and every way in which a csv can't be used."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bert.equations import TOLERANCE, evaluate, solves
from data.asdiv_a.prepare import ASDIV_A
from data.fetch import Folder, LocalPath, Url
from data.folder import sha256_of
from data.mawps.prepare import MAWPS
from data.svamp.prepare import SVAMP

# The folder data of github.com/arkilpatel/SVAMP.
SOURCE = Path(os.environ.get("SVAMP_SOURCE", Path(__file__).parents[3] / "shared/data/svamp"))
real = pytest.mark.skipif(not SOURCE.is_dir(), reason="no SVAMP folder here; SVAMP_SOURCE=FOLDER names it")

HEADER = "Question,Numbers,Equation,Answer,group_nums"
ROWS = [
    '"Ann has number0 pens , and number1 more . How many ?",8.0 2,+ number0 number1,10,"[1, 2]"',
    'a quarter of number0 ?,2.5,* number0 0.25,0.625,"[3]"',
    'number0 / number1 ?,1 3,/ number0 number1,0.333,"[3]"',
]
LINES = [
    {"question": "Ann has number0 pens , and number1 more . How many ?", "numbers": [8.0, 2.0]}
    | {"equation": "+ number0 number1", "answer": 10.0},
    {"question": "a quarter of number0 ?", "numbers": [2.5], "equation": "* number0 0.25", "answer": 0.625},
    {"question": "number0 / number1 ?", "numbers": [1.0, 3.0], "equation": "/ number0 number1", "answer": 0.333},
]


def write(path: Path, *rows: str, header: str = HEADER) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def home(tmp_path):
    for fold in range(5):
        write(tmp_path / f"home/cv_mawps/fold{fold}/train.csv", *ROWS)
        write(tmp_path / f"home/cv_mawps/fold{fold}/dev.csv", ROWS[0])
    return tmp_path / "home"


def run(*arguments, **changes):
    return replace(MAWPS, **changes).main([str(argument) for argument in arguments])


@pytest.fixture
def sha256(home, tmp_path):
    (tmp_path / "converted").mkdir()
    MAWPS.read(home, tmp_path / "converted")
    return sha256_of(*(tmp_path / "converted" / file for file in MAWPS.files.values()))


def test_csv_folds_become_json_lines(home, sha256, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--source", home, "--out", out, sha256=sha256) == 0
    lines = [json.loads(line) for line in (out / "3-train.jsonl").read_text().splitlines()]
    assert lines == LINES
    assert [json.loads(line) for line in (out / "4-test.jsonl").read_text().splitlines()] == LINES[:1]
    meta = json.loads((out / "meta.json").read_text())
    part = meta["splits"]["0-train"]
    assert (part["examples"], part["solved_by_their_equation"]) == (3, 2), "1/3 is not 0.333"
    capsys.readouterr()
    assert run("--out", out, sha256=sha256) == 0
    assert capsys.readouterr() == ("", ""), "nothing is done when the files are there"


def test_the_home_and_its_mirror(serve, home, sha256, tmp_path):
    def answer(request):
        file = home / request.path.removeprefix("/mirror/")
        if not request.path.startswith("/mirror/"):
            return request.send_error(404)
        request.send_response(200)
        request.end_headers()
        request.wfile.write(file.read_bytes())

    with serve(answer) as url:
        tables = [file.relative_to(home) for file in sorted(home.rglob("*.csv"))]
        sources = [Folder({str(t): Url(f"{place}/{t}", 10_000) for t in tables}) for place in (url, f"{url}/mirror")]
        assert run("--out", tmp_path / "out", sha256=sha256, sources=sources) == 0
    for data_set in (MAWPS, ASDIV_A, SVAMP):
        for source in data_set.sources:
            assert len(source.urls) == len(data_set.files)
            assert all(url.url.endswith(f"/data/{table}") for table, url in source.urls.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cv_mawps/fold1/dev.csv: can't be read: "),
        ([], "cv_mawps/fold1/dev.csv has no problems"),
        (["Question,Numbers,Answer"], "fold1/dev.csv has no column Equation; it must have Question, Numbers,"),
        ([HEADER, "number0 ?,1,+ number0,1,"], "dev.csv, problem 1: Equation: '+ number0' ends too early, 1 more"),
        ([HEADER, ROWS[0], "number0 ?,1,number0 number0,1,"], "problem 2: Equation: 'number0 number0' is complete"),
        ([HEADER, "number0 ?,1,+ number0 x,1,"], "problem 1: Equation: '+ number0 x': 'x' is no operator"),
        ([HEADER, "number0 ?,1,,1,"], "problem 1: Equation: '' ends too early"),
        ([HEADER, "number0 ?,1,number1,1,"], "problem 1: Equation: 'number1' has number1, but the problem has 1 num"),
        ([HEADER, "number0 ?,1 2,number1,1,"], "problem 1: the text has the slots number0, but there are 2 numbers"),
        ([HEADER, "number1 ?,1,number0,1,"], "problem 1: the text has the slots number1, but there are 1 numbers"),
        ([HEADER, "number0 ?,one,number0,1,"], "problem 1: Numbers has 'one', expected a number"),
        ([HEADER, "number0 ?,1,number0,nan,"], "problem 1: Answer has 'nan', expected a number"),
        ([HEADER, "number0 ?,1,number0"], "problem 1: Answer has '', expected a number"),
        ([HEADER, 'number0 ?,1,"number0'], "dev.csv, after problem 0: unexpected end of data"),
        ([HEADER, "another number0 ?,1,number0,1,"], "SHA-256 is "),
    ],
)
def test_what_is_not_the_homes_is_one_line_and_leaves_nothing(content, message, home, sha256, tmp_path, capsys):
    file = home / "cv_mawps/fold1/dev.csv"
    file.unlink()
    if content is not None:
        write(file, *content[1:], header=content[0] if content else HEADER)
    assert run("--source", home, "--out", tmp_path / "out", sha256=sha256) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: mawps: source: {home}: ") and message in error, error
    assert list((tmp_path / "out").iterdir()) == []


def test_text_of_another_encoding(home, sha256, tmp_path, capsys):
    file = home / "cv_mawps/fold0/train.csv"
    file.write_bytes(f"{HEADER}\n".encode() + b"caf\xe9 number0,1,number0,1,\n")
    assert run("--source", home, "--out", tmp_path / "out", sha256=sha256) == 2
    assert "cv_mawps/fold0/train.csv is not UTF-8 text (byte 47)" in capsys.readouterr().err


# What the data has wrong: question, numbers, equation, answer. First answers that are rounded; then those that differ.
ROUNDED = {
    "asdiv_a": ["johnny practiced for the track team"],
    "mawps": ["Soft drinks are on sale", "In one year , for the election", "A recipe calls for number0 cups of sugar"]
    + ["I need to figure out how to get the amount", "If number0 of a pound is worth", "It took me number0 minutes"]
    + ["A furniture store has a chair , originally"],
}
WRONG = {
    "asdiv_a": [],
    "mawps": ["Mrs. Hilt has number0 markers", "One stamp costs number0 cents", "On a recent trip to CA"]
    + ["James has number0 balloons . Amy has number1", "On Saturday , Sara spent $ number0 each"]
    + ["Mrs. Hilt bought a notebook for $ number0", "There was a stack of number0 sheets of used paper"],
}
ROUNDED["svamp"], WRONG["svamp"] = ([*a["asdiv_a"], *a["mawps"]] for a in (ROUNDED, WRONG))  # it contains both


@real
@pytest.mark.parametrize(
    ("data_set", "distinct", "tested"),
    [(ASDIV_A, 1217, 1217), (MAWPS, 1746, 1920), (SVAMP, 3963, 2000)],
    ids=["asdiv_a", "mawps", "svamp"],
)
def test_the_real_folds_and_their_equations(data_set, distinct, tested, tmp_path):
    meta = data_set.prepare(tmp_path, [LocalPath(SOURCE)])
    parts, rows = meta["splits"], {}
    assert sum(part["examples"] for split, part in parts.items() if split.endswith("-test")) == tested
    for part in parts.values():
        lines = [json.loads(line) for line in (tmp_path / part["file"]).read_text().splitlines()]
        rows |= {json.dumps(line): line for line in lines}
        solved = sum(solves(row["equation"].split(), row["numbers"], row["answer"]) for row in lines)
        assert solved == part["solved_by_their_equation"] >= 0.989 * len(lines)
    assert len(rows) == distinct
    rounded, wrong = [], []
    for row in rows.values():
        off = abs(evaluate(row["equation"].split(), row["numbers"]) - row["answer"])
        if off > TOLERANCE:
            (rounded if off < 0.05 else wrong).append(row["question"])
    for found, known in ((rounded, ROUNDED), (wrong, WRONG)):
        starts = known[data_set.name]
        assert len(found) == len(starts) and all(any(q.startswith(s) for s in starts) for q in found), found


@real
def test_the_lines_are_the_rows_of_the_csv(tmp_path):
    ASDIV_A.prepare(tmp_path, [LocalPath(SOURCE)])
    with open(SOURCE / "cv_asdiv-a/fold2/dev.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "2-test.jsonl").read_text().splitlines()]
    assert [(line["question"], line["equation"]) for line in lines] == [(r["Question"], r["Equation"]) for r in rows]
    assert [line["numbers"] for line in lines] == [[float(n) for n in row["Numbers"].split()] for row in rows]
    assert [line["answer"] for line in lines] == [float(row["Answer"]) for row in rows] and len(lines) == 238
