"""SST-2: from GLUE's zip, a mirror or a folder to JSON lines, and every way in which a table may not be GLUE's."""

import csv
import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import DownloadError
from data.fetch import Folder, LocalPath, Url
from data.sst2.prepare import SST2, convert

# A folder with the real train.tsv and dev.tsv.
GLUE = Path(os.environ.get("SST2_SOURCE", Path(__file__).parents[3] / "shared/data/sst2"))

TRAIN = [("of saucy ", 1), ('a "quoted" cliché , \\n ', 0), ("it 's a \x85 charming journey . ", 1)]
VALID = [("unflinchingly bleak ", 0), ("", 1)]
LINES = {
    "train": '{"text": "of saucy ", "label": 1}\n{"text": "a \\"quoted\\" cliché , \\\\n ", "label": 0}\n'
    '{"text": "it \'s a \x85 charming journey . ", "label": 1}\n',
    "valid": '{"text": "unflinchingly bleak ", "label": 0}\n{"text": "", "label": 1}\n',
}
SHA256 = hashlib.sha256("".join(LINES.values()).encode()).hexdigest()
SMALL = replace(SST2, sha256=SHA256, read=lambda path, folder: convert(path, folder, {"train": 3, "valid": 2}))


def table(examples):
    return ("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in examples)).encode()


@pytest.fixture
def glue(tmp_path):
    folder = tmp_path / "glue"
    folder.mkdir()
    (folder / "train.tsv").write_bytes(table(TRAIN))
    (folder / "dev.tsv").write_bytes(table(VALID))
    return folder


def pack(glue):
    path = glue.parent / "SST-2.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in glue.iterdir():
            archive.write(file, f"SST-2/{file.name}")
        archive.writestr("SST-2/test.tsv", "index\tsentence\n0\tno label here\n")
        archive.writestr("SST-2/original/sentences.txt", "more")
    return path


def run(*arguments, sources=()):
    return replace(SMALL, sources=sources).main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_or_the_zip_becomes_json_lines(kind, glue, tmp_path, capsys):
    source, out = glue if kind == "folder" else pack(glue), tmp_path / "out"
    assert run("--source", source, "--out", out) == 0
    assert capsys.readouterr().out == ""
    assert sorted(file.name for file in out.iterdir()) == ["meta.json", "train.jsonl", "valid.jsonl"]
    meta = json.loads((out / "meta.json").read_text())
    for split, examples in (("train", TRAIN), ("valid", VALID)):
        content = (out / f"{split}.jsonl").read_bytes()
        assert content.decode() == LINES[split]
        assert [json.loads(line) for line in content.decode().split("\n")[:-1]] == [
            {"text": text, "label": label} for text, label in examples
        ]
        assert meta["splits"][split] == {
            "file": f"{split}.jsonl",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "examples": len(examples),
        }
    assert meta["dataset"] == "sst2" and meta["sha256"] == SHA256 and meta["source"] == str(source)

    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    for flags in ((), ("--verify",)):
        assert run("--out", out, *flags) == 0
        assert capsys.readouterr() == ("", "")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == times
    (out / "valid.jsonl").write_bytes((out / "valid.jsonl").read_bytes().replace(b"bleak", b"great"))
    assert run("--source", source, "--out", out, "--verify") == 0
    assert (out / "valid.jsonl").read_bytes().decode() == LINES["valid"]


def test_line_ends_of_windows_make_no_difference(glue, tmp_path):
    for file in glue.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert run("--source", glue, "--out", tmp_path / "out") == 0


def test_a_mirror_of_single_files_takes_over_from_a_zip_that_is_gone(serve, glue, tmp_path, capsys):
    def answer(request):
        file = glue / request.path[1:]
        if not file.exists():
            return request.send_error(403)
        request.send_response(200)
        request.end_headers()
        request.wfile.write(file.read_bytes())

    with serve(answer) as url:
        tables = Folder({"train.tsv": Url(f"{url}/train.tsv", 1000), "dev.tsv": Url(f"{url}/dev.tsv", 1000)})
        assert run("--out", tmp_path / "out", sources=[Url(f"{url}/SST-2.zip", 1000), tables]) == 0
        assert json.loads((tmp_path / "out/meta.json").read_text())["source"] == tables.name
        (glue / "dev.tsv").unlink()
        assert run("--out", tmp_path / "new", sources=[Url(f"{url}/SST-2.zip", 1000), tables]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "SST-2.zip: HTTP 403 Forbidden" in error and "dev.tsv: HTTP 403" in error and "--source: GLUE's SST" in error
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.tsv", b"", "train.tsv, line 1: the header is '', expected 'sentence\\tlabel'"),
        ("train.tsv", table(TRAIN)[15:], "train.tsv, line 1: the header is 'of saucy \\t1', expected"),
        ("train.tsv", table(TRAIN[:2]), "train.tsv has 2 examples, expected 3"),
        ("dev.tsv", table(TRAIN), "dev.tsv has 3 examples, expected 2"),
        ("dev.tsv", table([("a", 0), ("b", 2)]), "dev.tsv, line 3: the label is '2', expected '0' or '1'"),
        ("dev.tsv", table([("a", 0), ("b", "")]), "dev.tsv, line 3: the label is '', expected"),
        ("dev.tsv", table([("a", 0), ("b\tc", 1)]), "dev.tsv, line 3: 'b\\tc\\t1', expected a sentence, one tab"),
        ("dev.tsv", b"sentence\tlabel\n\x1b[2J\n", "dev.tsv, line 2: '\\x1b[2J', expected a sentence, one tab"),
        ("dev.tsv", b"sentence\tlabel\n" + b"x" * 10_000, "dev.tsv, line 2: 'xxxx"),
        ("dev.tsv", b"sentence\tlabel\ncaf\xe9\t1\n", "dev.tsv is not UTF-8 text (byte 18)"),
        ("dev.tsv", table([("other", 0), ("words", 1)]), "SHA-256 is "),
        ("dev.tsv", b"\n" * 20_000_001, "dev.tsv: holds more than 20000000 bytes"),
        ("dev.tsv", None, "No such file"),
    ],
)
def test_what_is_not_glues_is_one_line_and_leaves_nothing(file, content, message, glue, tmp_path, capsys):
    (glue / file).unlink() if content is None else (glue / file).write_bytes(content)
    assert run("--source", glue, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: sst2: source: {glue}: ") and message in error, error
    assert error.endswith("it must be GLUE's SST-2.zip or a folder with its train.tsv and dev.tsv")
    assert error.isprintable() and len(error) < 500
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_no_zip_or_another_one(glue, tmp_path, capsys):
    for source, message in (
        (glue / "train.tsv", "train.tsv: can't be read: File is not a zip file"),
        (tmp_path / "none", "no such file or folder"),
    ):
        assert run("--source", source, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    (glue / "dev.tsv").rename(glue / "other.tsv")
    with pytest.raises(DownloadError, match="dev.tsv: the .zip holds 0 files called dev.tsv, expected one"):
        SMALL.prepare(tmp_path / "out", [LocalPath(pack(glue))])


def test_small_tables_are_not_the_real_ones(glue, tmp_path, capsys):
    assert SST2.main(["--source", str(glue), "--out", str(tmp_path / "out")]) == 2
    assert "train.tsv has 3 examples, expected 67349" in capsys.readouterr().err


@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE tables here; SST2_SOURCE=FOLDER names them")
def test_the_real_tables(tmp_path):
    meta = SST2.prepare(tmp_path, [LocalPath(GLUE)])
    assert {split: part["examples"] for split, part in meta["splits"].items()} == {"train": 67_349, "valid": 872}
    for split, name in (("train", "train.tsv"), ("valid", "dev.tsv")):
        with open(GLUE / name, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        assert [json.loads(line) for line in lines[:-1]] == [
            {"text": row["sentence"], "label": int(row["label"])} for row in rows
        ]
    assert SST2.is_prepared(tmp_path, contents=True)
