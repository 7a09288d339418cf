"""Where the text may come from: files, the hub or what takes its place, and what of it is held out."""

import hashlib
import re
import sys
import time
import types
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import strategies as st
from stories import page, read, run, story

from data.bookcorpus import corpus as corpus_module
from data.bookcorpus import prepare as bookcorpus
from data.bookcorpus.corpus import Store, from_enwik8, from_hub, hold_out, unwrap
from data.bookcorpus.wikitext import articles, strip_markup
from data.enwik8.prepare import cut
from data.errors import SourceError
from data.fetch import LocalPath


def test_split_does_not_depend_on_names_or_order():
    digests = [hashlib.sha256(bytes([i])).hexdigest() for i in range(40)]
    sizes = [100 + i for i in range(40)]
    parts = hold_out(sizes, digests, True)
    assert sorted(i for part in parts.values() for i in part) == list(range(40))
    turned = hold_out(sizes[::-1], digests[::-1], True)
    for split in parts:
        assert {digests[i] for i in parts[split]} == {digests[::-1][i] for i in turned[split]}
    for split in ("valid", "test"):
        assert 0.04 < sum(sizes[i] for i in parts[split]) / sum(sizes) < 0.11
    # A text without marks between documents: the end is held out, in one piece.
    assert hold_out(sizes, digests, False)["test"] == [38, 39]
    assert hold_out(sizes, digests, False)["train"] == list(range(36))
    assert {len(part) for part in hold_out([900, 1, 900], digests[:3], True).values()} == {1}
    with pytest.raises(ValueError, match="2 documents; there must be at least 3"):
        hold_out([1, 1], digests[:2], True)


def test_unwrap_joins_lines_and_keeps_paragraphs():
    assert (
        unwrap("\ufeffA line\r\nand its end.\r\n\r\n\r\n  Next\tone. \n \n") == "\ufeffA line and its end.\nNext one.\n"
    )
    assert unwrap(" \n\n ") == ""


@hypothesis.given(st.text(st.sampled_from("ab \n\r\t\x0b\x1c\x85\xa0\u2028\u3000"), max_size=40))
def test_unwrap_is_its_definition(text):
    parts = re.split(r"\r?\n[ \t]*\r?\n", text)
    assert unwrap(text) == "".join(" ".join(part.split()) + "\n" for part in parts if part.split())


def test_max_bytes_stops_early_but_leaves_three_documents(tmp_path):
    store = Store(tmp_path / "text")
    store.fill((story(n) for n in range(20)), max_bytes=1)
    assert len(store.spans) == 3
    store = Store(tmp_path / "more")
    store.fill((story(n) for n in range(20)), max_bytes=10_000)
    assert 10_000 <= sum(size for _, size in store.spans) < 13_000
    assert list(store.lines([1]))[0] == [line for line in story(1).split("\n") if line]


# ---- the hub, and what takes its place


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        return {"text": [f"sentence number {i} says something ." for i in range(self.count)[part]]}


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_hub_rows_become_stretches_whose_end_is_held_out(monkeypatch, tmp_path):
    def load(repository, revision, split):
        if revision is None:
            raise ConnectionError("no such\nhost")
        assert split == "train"
        return Rows(1000)

    fake_datasets(monkeypatch, load)
    monkeypatch.setattr(corpus_module, "STRETCH", 50)
    found = from_hub()
    assert not found.whole and found.origin == {"hub": "bookcorpus/bookcorpus", "revision": "refs/convert/parquet"}
    request = {"model": "bert", "vocab_size": 200, "max_bytes": None, "block_length": 16}
    bookcorpus.prepare(tmp_path / "out", found, request)
    meta, tokenizer, blocks = read(tmp_path / "out")
    numbers = {
        split: [int(word) for word in tokenizer.decode(rows[:, 1:-1].reshape(-1).tolist()).split() if word.isdigit()]
        for split, rows in blocks.items()
    }
    assert max(numbers["train"]) < min(numbers["valid"]) <= max(numbers["valid"]) < min(numbers["test"])
    assert meta["dataset"] == "bookcorpus" and meta["splits"]["test"]["documents"] == 1


def test_a_hub_that_answers_without_end_is_given_up(monkeypatch, serve):
    def headers(request):
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(100):
            request.wfile.write(b"X: y\r\n")
            time.sleep(0.05)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve(headers) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        start = time.monotonic()
        with pytest.raises(SourceError, match="no answer within 0.5 s"):
            corpus_module._check_hub(timeout=0.5)
        assert time.monotonic() - start < 3


def test_without_a_hub_it_is_the_prose_of_enwik8_and_says_so(monkeypatch, tmp_path, capsys):
    def load(*_, **__):
        raise ConnectionError("no route\nto the hub")

    fake_datasets(monkeypatch, load)
    pages = [page(f"Topic {n}", story(n).replace("\n\n", "\n")) for n in range(12)]
    text = "".join(pages).encode()
    (tmp_path / "pages").write_bytes(text)
    sizes = {"train": 9000, "valid": 100, "test": len(text) - 9100}
    sha256 = hashlib.sha256(text).hexdigest()
    enwik8 = replace(
        bookcorpus.ENWIK8,
        folder=tmp_path / "enwik8",
        sha256=sha256,
        sources=[LocalPath(tmp_path / "pages")],
        read=lambda path, folder: cut(path, folder, sizes),
    )
    monkeypatch.setattr(bookcorpus, "ENWIK8", enwik8)
    out = tmp_path / "out"
    assert run("--scale", "smoke", "--out", out, "--block_length", 32, "--vocab_size", 300) == 0
    assert "using prose out of enwik8 instead" in capsys.readouterr().err
    meta, tokenizer, blocks = read(out)
    assert meta["dataset"] == "enwik8-prose" and meta["origin"] == {"enwik8": sha256}
    assert "in place of BookCorpus" in meta["note"] and "no route to the hub" in meta["note"]
    assert sum(part["documents"] for part in meta["splits"].values()) == 12


def test_neither_hub_nor_enwik8_is_one_line(monkeypatch, tmp_path, capsys):
    def load(*_, **__):
        raise ConnectionError("no route")

    fake_datasets(monkeypatch, load)
    enwik8 = replace(bookcorpus.ENWIK8, folder=tmp_path / "enwik8", sources=[LocalPath(tmp_path / "nowhere")])
    monkeypatch.setattr(bookcorpus, "ENWIK8", enwik8)
    assert run("--scale", "smoke", "--out", tmp_path / "out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (f"error: bookcorpus: {tmp_path / 'nowhere'}: no such file or folder; give text files with --source")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_missing_library_is_a_reason_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match="datasets is not installed"):
        from_hub()


# ---- wiki markup


SOURCE = """{{Infobox|name={{nested|x}}|y}}
'''Anarchism''' is a ''political'' theory [[Greek language|Greek]] &quot;without rulers&quot; that calls for it.
&lt;ref name=&quot;a&quot;&gt;A [[book]] nobody reads, page 7 of many.&lt;/ref&gt;
== History of the matter in question ==
[[Image:Pic.jpg|thumb|A [[labelled]] caption that goes on, and on, for long.]]
It began in [[1848]]&amp;nbsp;and ended, as [http://a.org the report] says, with &lt;b&gt;nothing&lt;/b&gt; at all.
* A list item that is long enough to be a sentence, but is none.
{| class=&quot;wikitable&quot;
| a cell that is long enough to be a sentence as well, or is it?
|}
Short line.
[[Category:Politics]] [[de:Anarchismus]]
"""


def test_markup_goes_and_prose_stays():
    assert strip_markup(SOURCE).split("\n\n") == [
        'Anarchism is a political theory Greek "without rulers" that calls for it.',
        "It began in 1848 and ended, as the report says, with nothing at all.",
    ]


def test_only_articles_come_through_wherever_the_stream_is_cut():
    prose = "\n".join(f"Sentence {i} of this article says a few things about it." for i in range(15))
    dump = "".join(
        [
            page("Real", prose),
            page("Moved", "#REDIRECT [[Real]] " + prose),
            page("Talk:Real", prose),
            page("Wikipedia:Rules", prose),
            page("Stub", "Only one sentence is here, and that is it."),
            page("Second: a title with a colon", prose),
            page("Cut off", prose)[:-7],
        ]
    ).encode()
    expected = prose.replace("\n", "\n\n")
    for size in (7, 100, len(dump)):
        pieces = (dump[i : i + size] for i in range(0, len(dump), size))
        assert list(articles(pieces)) == [expected, expected]


def test_fallback_can_be_read_twice():
    text = "".join(page(f"T{n}", story(n).replace("\n\n", "\n")) for n in range(3)).encode()
    found = from_enwik8(lambda: iter([text]), "0" * 64, "why")
    assert list(found.documents()) == list(found.documents()) and len(list(found.documents())) == 3
