"""Text to blocks: what is in them, what is held out, and what goes wrong."""

import gzip
import hashlib
import json
import lzma
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from stories import name_of, read, run, small, story
from tokenizers import Tokenizer

from bert.data import Blocks
from data.bookcorpus import corpus as corpus_module
from data.bookcorpus import prepare as bookcorpus
from data.bookcorpus.corpus import Store, hold_out, pieces, text_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "deeper").mkdir(parents=True)
    for number in range(8):
        content = story(number).encode()
        path = folder / f"{number}.txt"
        if number == 1:
            (folder / "1.txt.xz").write_bytes(lzma.compress(content))
        elif number == 2:
            (folder / "deeper" / "2.txt.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    (folder / "copy.txt").write_bytes(story(3).encode())
    (folder / "notes.md").write_text("not text to train on")
    return folder


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_blocks_hold_the_text_and_whole_documents_are_held_out(model, source, tmp_path, capsys):
    out = tmp_path / "out"
    assert small(source, out, model) == 0
    assert capsys.readouterr().out.strip() == str(out)
    meta, tokenizer, blocks = read(out)
    ids = meta["special_ids"]
    texts = {}
    for split, rows in blocks.items():
        assert len(rows) == meta["splits"][split]["blocks"] > 0
        assert (rows[:, 0] == ids["start"]).all() and (rows[:, -1] == ids["end"]).all()
        assert not np.isin(rows, (ids["pad"], ids["mask"])).any()
        if model == "roberta":
            assert not (rows == ids["unknown"]).any()
        texts[split] = tokenizer.decode(rows[:, 1:-1].reshape(-1).tolist()).lower()
        assert hashlib.sha256((out / f"{split}.bin").read_bytes()).hexdigest() == meta["splits"][split]["sha256"]
    assert meta["duplicates_left_out"] == 1
    assert sum(part["documents"] for part in meta["splits"].values()) == 8
    places = {n: [s for s in texts if f"zebra{name_of(n)}comes" in "".join(texts[s].split())] for n in range(8)}
    assert all(len(splits) == 1 for splits in places.values()), places
    assert {split for splits in places.values() for split in splits} == {"train", "valid", "test"}
    # Every token of a document, in its order: only the last block's rest is missing.
    first = "".join(story(0).lower().split())[:200]
    split = places[0][0]
    assert first in "".join(texts[split].split()).replace(tokenizer.id_to_token(ids["end"]).lower(), "")


@pytest.mark.parametrize("scale", bookcorpus.SCALES)
def test_blocks_are_the_sequences_that_the_scale_trains_on(scale):
    scales = yaml.safe_load((ROOT / "bert/configs/masked_lm.yaml").read_text())
    assert scales.keys() == bookcorpus.SCALES.keys()
    assert bookcorpus.SCALES[scale]["block_length"] == scales[scale]["seq_len"]


def test_every_sequence_starts_and_ends_with_its_special_token(source, tmp_path):
    flags = ["--scale", "smoke", "--source", source, "--out", tmp_path, "--vocab_size", 320]
    assert run(*flags) == 0
    meta, _, blocks = read(tmp_path)
    assert meta["block_length"] == meta["request"]["block_length"] == 32
    trained = Blocks(tmp_path, "bert").sequences("train", 32)
    assert np.array_equal(trained, blocks["train"])
    assert (trained[:, 0] == meta["special_ids"]["start"]).all() and (
        trained[:, -1] == meta["special_ids"]["end"]
    ).all()
    assert run(*flags, "--block_length", 64) == 0
    assert read(tmp_path)[0]["block_length"] == 64


def test_vocabulary_is_learned_from_train_alone(source, tmp_path):
    # Each document has a letter of its own; those of the held-out ones must stay unknown.
    for number, path in enumerate(text_files([source])[0]):
        if path.suffix == ".txt":
            path.write_text(path.read_text() + f"\n\n{chr(0x430 + number) * 3}\n")
    assert small(source, tmp_path / "out") == 0
    store = Store(tmp_path / "text")
    store.fill(corpus_module.from_files(text_files([source])[0]).documents())
    parts = hold_out([size for _, size in store.spans], store.digests, True)
    letters = {
        split: {c for lines in store.lines(part) for c in "".join(lines).lower()} for split, part in parts.items()
    }
    vocabulary = {c for token in read(tmp_path / "out")[1].get_vocab() if token[0] != "[" for c in token}
    own = {chr(0x430 + number) for number in range(9)}
    assert vocabulary & own == letters["train"] & own
    assert (letters["valid"] | letters["test"]) & own - vocabulary


def test_what_is_taken_from_a_folder_and_what_is_left_out(source, tmp_path, capsys):
    about = ["SOURCE.txt", "README.txt", "License.txt.xz", "deeper/COPYING.gz", "sources.txt"]
    hidden = [".draft.txt", ".old/0.txt", "._0.txt"]
    books = ["source_of_the_nile.txt", "deeper/The Source.txt", "license.to.kill.txt", "readme1.txt"]
    for file in (*about, *hidden, *books):
        (source / file).parent.mkdir(exist_ok=True)
        (source / file).write_text("about")
    taken, left_out = text_files([source])
    own = {"0.txt", "1.txt.xz", "deeper/2.txt.gz", *(f"{n}.txt" for n in range(3, 8)), "copy.txt"}
    assert {str(file.relative_to(source)) for file in taken} == {*own, *books}
    assert {str(file.relative_to(source)) for file in left_out} == {*about, *hidden, "notes.md"}
    # A path to a file means that file.
    named, left_out = text_files([source / "SOURCE.txt", source, source / ".draft.txt", source / "notes.md"])
    assert named == [source / "SOURCE.txt", *taken, source / ".draft.txt", source / "notes.md"]
    assert not {source / "SOURCE.txt", source / ".draft.txt", source / "notes.md"} & set(left_out)

    for file in (*hidden, *books):
        (source / file).unlink()
    assert small(source, tmp_path / "out") == 0
    assert (
        "bookcorpus: left out: License.txt.xz, README.txt, SOURCE.txt, COPYING.gz, notes.md, 1 more; give the path of a"
        in capsys.readouterr().err
    )
    origin = read(tmp_path / "out")[0]["origin"]
    assert {name for name, _ in origin} == {Path(file).name for file in own}
    for file in about:
        (source / file).unlink()
    assert small(source, tmp_path / "out") == 0
    assert capsys.readouterr().err == "", "the same request: what is left out makes no difference"


def test_same_request_does_nothing_and_another_one_does(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert small(source, out) == 0
    sha256 = read(out)[0]["sha256"]
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    assert small(source, out) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == times
    assert small(source, out, "bert", "--force") == 0
    assert read(out)[0]["sha256"] == sha256, "not the same bytes again"
    (source / "0.txt").write_text(story(99))
    assert small(source, out) == 0
    assert read(out)[0]["sha256"] != sha256
    (out / "test.bin").write_bytes(b"")
    assert small(source, out) == 0 and (out / "test.bin").stat().st_size


def test_default_folder_tells_requests_apart(monkeypatch):
    monkeypatch.chdir(ROOT)

    def out(*flags):
        options = bookcorpus._parse([str(flag) for flag in flags])
        return str(bookcorpus.default_out(options, "cpu"))

    assert out("--model", "roberta") == "data/bookcorpus/roberta-cpu"
    own = out("--source", "a")
    assert own.startswith("data/bookcorpus/bert-cpu-") and own != out("--source", "b") != out("--vocab_size", 7)


def test_given_vocabularies_are_used_as_they_are(source, tmp_path):
    for model in ("bert", "roberta"):
        assert small(source, tmp_path / model, model) == 0
        _, trained, blocks = read(tmp_path / model)
        files = tmp_path / f"{model}-files"
        files.mkdir()
        trained.model.save(str(files))
        for name, given in (("files", files), ("json", tmp_path / model / "tokenizer.json")):
            out = tmp_path / f"{model}-{name}"
            out = out if name == "json" else tmp_path / f"{model}-again"
            assert small(source, out, model, "--tokenizer", given) == 0
            meta, _, again = read(out)
            assert meta["tokenizer"]["origin"] == "given"
            assert all(np.array_equal(blocks[split], again[split]) for split in blocks)


def test_long_paragraphs_are_cut_without_a_change_of_tokens(source, tmp_path):
    paragraph = " ".join(story(n).replace("\n\n", " ").strip() for n in range(5))
    longest = max(map(len, paragraph.split()))
    for length in (1, 7, 500, len(paragraph)):
        cut = list(pieces(paragraph, length))
        assert "".join(cut) == paragraph
        assert all(length <= len(piece) <= length + 1 + longest for piece in cut[:-1])
    assert len(list(pieces(paragraph, 500))) > 10
    assert list(pieces("", 5)) == [""] and list(pieces("x" * 20, 5)) == ["x" * 20]
    tokenizers = []
    for model in ("bert", "roberta"):
        assert small(source, tmp_path / model, model) == 0
        tokenizers.append(read(tmp_path / model)[1])
    without_prefix = json.loads(tokenizers[1].to_str())
    assert without_prefix["pre_tokenizer"]["add_prefix_space"]
    without_prefix["pre_tokenizer"]["add_prefix_space"] = False
    tokenizers.append(Tokenizer.from_str(json.dumps(without_prefix)))
    for tokenizer in tokenizers:
        whole = tokenizer.encode(paragraph, add_special_tokens=False).ids
        for length in (1, 7, 500):
            parts = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces(paragraph, length)]
            assert [token for part in parts for token in part] == whole


def test_a_tokenizer_is_given_little_at_a_time(tmp_path):
    """Of a book in a single line too, since tokenizers need many times the memory of their input."""
    lengths = []

    class Tokens:
        def encode_batch(self, batch, add_special_tokens):
            lengths.append(sum(map(len, batch)))
            assert max(map(len, batch)) < 10_100
            return [types.SimpleNamespace(ids=[len(word) for word in text.split()]) for text in batch]

    text = "some words and " * 80_000 + "end"
    store = Store(tmp_path / "text")
    store.fill([text, "a second\n\none", text.replace("some", "more\n\n")])
    ids = {"start": 100, "end": 101}
    blocks = bookcorpus.write_blocks(tmp_path / "out", Tokens(), store.lines([0, 1]), 12, ids, "uint16")
    assert len(lengths) == 3 and max(lengths) <= 1_000_000
    rows = np.fromfile(tmp_path / "out", dtype="uint16").reshape(-1, 12)
    tokens = [4, 5, 3] * 80_000 + [3, 101, 1, 6, 3]
    assert blocks == len(rows) == len(tokens) // 10
    assert (rows[:, 0] == 100).all() and (rows[:, -1] == 101).all()
    assert np.array_equal(rows[:, 1:-1].reshape(-1), tokens[: 10 * blocks])
    lengths.clear()
    bookcorpus.write_blocks(tmp_path / "out", Tokens(), store.lines([2]), 12, ids, "uint16")
    assert len(lengths) == 2 and max(lengths) <= 1_000_000


# ---- mistakes


def test_a_word_of_megabytes_is_one_line(source, tmp_path, capsys):
    (source / "word.txt").write_text(f"a {'x' * 10_000} fits\n\n{'y' * 20_000_000} end")
    assert small(source, tmp_path / "out") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"error: bookcorpus: source: {source / 'word.txt'} has a word of 20000000 characters, expected at most 10000; "
        "it must be text with blanks between its words"
    )
    assert list((tmp_path / "out").iterdir()) == []
    (source / "word.txt").write_text(f"a {'x' * 10_000} fits\n\n")
    assert small(source, tmp_path / "out") == 0


def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "about").mkdir()
    (tmp_path / "about" / "README.txt").write_text("about nothing")
    (tmp_path / "two").mkdir()
    for n in range(2):
        (tmp_path / "two" / f"{n}.txt").write_text(story(n))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n")
    (tmp_path / "short").mkdir()
    for n in range(3):
        (tmp_path / "short" / f"{n}.txt").write_text(f"too short {n}")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "latin" / "b.xz").write_bytes(b"\xfd7zXZ\x00 damaged")
    (tmp_path / "bomb.xz").write_bytes(lzma.compress(b"a " * 600_000, preset=1))
    monkeypatch.setattr(corpus_module, "MAX_FILE_BYTES", 1_000_000)
    (tmp_path / "large.txt").write_bytes(b"a " * 600_000)
    cases = [
        ([tmp_path / "bomb.xz"], [], "bomb.xz holds more than 1000000 bytes"),
        ([tmp_path / "large.txt"], [], "large.txt holds more than 1000000 bytes"),
        ([tmp_path / "nowhere"], [], "no such file or folder"),
        ([tmp_path / "empty"], [], "no .txt, .xz, .gz file in"),
        ([tmp_path / "about"], [], "no .txt, .xz, .gz file in {}; left out: README.txt".format(tmp_path / "about")),
        ([tmp_path / "two"], [], "2 documents; there must be at least 3"),
        ([tmp_path / "short"], [], "fewer tokens than a block of 32"),
        ([tmp_path / "latin" / "a.txt"], [], "is not UTF-8 text (byte 3)"),
        ([tmp_path / "latin" / "b.xz"], [], "can't be read"),
        ([source], ["--tokenizer", tmp_path / "nothing"], "tokenizer: no such file"),
        ([source], ["--tokenizer", tmp_path / "empty"], "has neither tokenizer.json nor vocab.txt"),
        ([source], ["--tokenizer", tmp_path / "vocab.txt"], "has no [MASK], which bert needs"),
    ]
    for paths, flags, words in cases:
        flags = ["--scale", "smoke", "--source", *paths, "--out", tmp_path / "out", "--block_length", 32, *flags]
        assert run(*flags) == 2, words
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: bookcorpus: ") and words in last, last
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_failed_replacement_keeps_no_false_record(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert small(source, out) == 0
    (source / "0.txt").write_text(story(77))
    monkeypatch.setattr(os, "replace", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        small(source, out)
    assert not (out / "meta.json").exists()
    assert sorted(file.name for file in out.iterdir()) == ["test.bin", "tokenizer.json", "train.bin", "valid.bin"]
