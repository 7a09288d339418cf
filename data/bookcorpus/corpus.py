"""Where documents come from: the hub, text files, or enwik8; and which of them are held out."""

from __future__ import annotations

import hashlib
import http.client
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.bookcorpus.wikitext import articles
from data.errors import SourceError, printable
from data.folder import sha256_of
from data.unpack import read_file

# The maintained copies of BookCorpus on the hub: plain Parquet, no loading script.
HUB = (("rojagtap/bookcorpus", None), ("bookcorpus/bookcorpus", "refs/convert/parquet"))
STRETCH = 10_000  # sentences
SUFFIXES = (".txt", ".xz", ".gz")
# Files about books, by their names without SUFFIXES, in upper or lower case.
NOTES = {"readme", "license", "licence", "copying", "copyright", "notice", "source", "sources", "authors", "changelog"}
MAX_FILE_BYTES = 1_000_000_000  # of text in one file: a file is one document, and is read as a whole
# Tokenizers need much memory for a long text, and hours for a word of millions of characters.
PIECE_LENGTH = 10_000  # characters after which a paragraph is cut
MAX_WORD_LENGTH = 10_000  # characters without a blank between them
HELD_OUT, MOST_HELD_OUT = 0.05, 20_000_000  # valid and test each: this share of the bytes, at most so many
_TOO_LONG_WORD = re.compile(rf"(?<!\S)\S{{{MAX_WORD_LENGTH + 1}}}")
_UNEVEN_BLANKS = re.compile(r" \s+|[^\S ]\s*")  # any but a single space


@dataclass(frozen=True)
class Corpus:
    """Text to prepare.

    name: what results call it.
    origin: where it came from, as JSON.
    documents: makes an iterator over the texts.
    whole: each text is a document of its own. If not, they are consecutive stretches of a text that does not mark where
        a document ends, so that only its last stretches can be held out.
    note: what the record says of the text besides.
    """

    name: str
    origin: Any
    documents: Callable[[], Iterator[str]]
    whole: bool = True
    note: str | None = None


def text_files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files of text meant by `paths`, and those left out; each once, a folder's sorted.

    A path to a file is taken as it is. Of a folder, what ends in SUFFIXES anywhere below is taken, unless it is hidden
    (a dot before its name or a folder's) or its name is one of NOTES. ValueError when a path does not exist or a folder
    has no text.
    """
    taken: list[Path] = []
    left_out: list[Path] = []
    for path in paths:
        if path.is_file():
            taken.append(path)
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            texts = [file for file in files if _is_text(file.relative_to(path))]
            others = sorted(set(files) - set(texts))
            if not texts:
                raise ValueError(f"source: no {', '.join(SUFFIXES)} file in {path}{listed('; left out: ', others)}")
            taken += texts
            left_out += others
        else:
            raise ValueError(f"source: no such file or folder: {path}")
    once = dict.fromkeys(taken)
    return list(once), [file for file in dict.fromkeys(left_out) if file not in once]


def _is_text(path: Path) -> bool:
    """Whether a file of a folder, `path` relative to it, is text rather than about the text."""
    name = path.name.lower()
    for suffix in (".xz", ".gz", ".txt"):
        name = name.removesuffix(suffix)
    return path.suffix in SUFFIXES and name not in NOTES and not any(part.startswith(".") for part in path.parts)


def listed(before: str, files: Sequence[Path], most: int = 5) -> str:
    """`before` and the names of `files`, the first `most` of them, for a message; nothing when there are none."""
    names = [printable(file.name) for file in files[:most]]
    more = [f"{len(files) - most} more"] if len(files) > most else []
    return before + ", ".join(names + more) if files else ""


def from_files(files: Sequence[Path], name: str = "text") -> Corpus:
    """Every file is a document: plain UTF-8, or .xz or .gz of it. Its SHA-256 is recorded, its path is not.

    Iterating over the documents raises ValueError for a file that can't be read, is larger than MAX_FILE_BYTES, or has
    a word longer than MAX_WORD_LENGTH.
    """

    def documents() -> Iterator[str]:
        for file in files:
            try:
                text = b"".join(read_file(file, MAX_FILE_BYTES)).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"source: {file} is not UTF-8 text (byte {error.start})") from None
            except SourceError as error:
                raise ValueError(f"source: {file} {error}") from None
            if found := _TOO_LONG_WORD.search(text):
                length = re.compile(r"\S+").match(text, found.start()).end() - found.start()
                raise ValueError(
                    f"source: {file} has a word of {length} characters, expected at most {MAX_WORD_LENGTH}; "
                    "it must be text with blanks between its words"
                )
            yield text

    return Corpus(name, [[file.name, sha256_of(file)] for file in files], documents)


def from_hub() -> Corpus:
    """BookCorpus from the hub (or the machine's cache of it) with `datasets`.

    Its rows are sentences in the order of the books, and where a book ends is not marked. Raises SourceError.
    """
    try:
        import datasets
    except ImportError:
        raise SourceError("the package datasets is not installed") from None
    _check_hub()
    failures = []
    for repository, revision in HUB:
        try:
            rows = datasets.load_dataset(repository, revision=revision, split="train")
        except Exception as error:  # dozens of types: connection, missing, gated, damaged
            failures.append(f"{repository}: {type(error).__name__}: {printable(error, 200)}")
            continue

        def documents(rows: Any = rows) -> Iterator[str]:
            for start in range(0, len(rows), STRETCH):
                yield "\n\n".join(rows[start : start + STRETCH]["text"])

        return Corpus("bookcorpus", {"hub": repository, "revision": revision}, documents, whole=False)
    raise SourceError("; ".join(failures))


def _check_hub(timeout: float = 10.0) -> None:
    """One quick look whether the hub answers; the library's own retries take minutes. Offline mode means the cache."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answers: queue.SimpleQueue[object] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # any answer will do
        except (OSError, http.client.HTTPException, ValueError) as error:
            answers.put(getattr(error, "reason", error))
            return
        answers.put(None)

    # A thread, which may be left behind: the timeout alone bounds each read, and headers may have no end.
    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=timeout)
    except queue.Empty:
        failure = f"no answer within {timeout:g} s"
    if failure is not None:
        raise SourceError(f"{url}: {printable(failure)}")


def from_enwik8(chunks: Callable[[], Iterator[bytes]], sha256: str, why: str) -> Corpus:
    """Prose of the articles in enwik8, in place of books; `why` is recorded."""
    note = f"prose stripped out of enwik8, in place of BookCorpus: {why}"
    return Corpus("enwik8-prose", {"enwik8": sha256}, lambda: articles(chunks()), note=note)


@dataclass
class Store:
    """Documents as one UTF-8 file, to be read again and again: a paragraph a line, duplicates left out."""

    path: Path
    spans: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes
    digests: list[str] = field(default_factory=list)
    duplicates: int = 0

    def fill(self, documents: Iterable[str], max_bytes: int | None = None, at_least: int = 3) -> None:
        """Write `documents` until `max_bytes` are reached, but at least `at_least` of them."""
        seen: set[str] = set()
        offset = 0
        with open(self.path, "wb") as file:
            for text in documents:
                content = unwrap(text).encode()
                if not content:
                    continue
                digest = hashlib.sha256(content).hexdigest()
                if digest in seen:
                    self.duplicates += 1
                    continue
                seen.add(digest)
                file.write(content)
                self.spans.append((offset, len(content)))
                self.digests.append(digest)
                offset += len(content)
                if max_bytes is not None and offset >= max_bytes and len(self.spans) >= at_least:
                    break

    def lines(self, indices: Iterable[int]) -> Iterator[list[str]]:
        """The paragraphs of each of these documents, very long ones in pieces."""
        with open(self.path, "rb") as file:
            for index in indices:
                offset, size = self.spans[index]
                file.seek(offset)
                yield [piece for line in file.read(size).decode().splitlines() for piece in pieces(line)]


def unwrap(text: str) -> str:
    """One paragraph a line, each ended by a line break: lines that an empty one doesn't separate belong together."""
    # " ".join(part.split()), without a list of all words: a book may be a single paragraph.
    paragraphs = (_UNEVEN_BLANKS.sub(" ", part).strip() for part in re.split(r"\r?\n[ \t]*\r?\n", text))
    return "".join(paragraph + "\n" for paragraph in paragraphs if paragraph)


def pieces(paragraph: str, length: int = PIECE_LENGTH) -> Iterator[str]:
    """`paragraph` cut at the first blank after each `length` characters, into pieces with the same tokens as the whole.

    Tokenizers cut text into words there anyway. A piece keeps the blank before it: for some tokenizers the word after a
    blank is another one than without.
    """
    start = 0
    while (end := paragraph.find(" ", start + length)) >= 0:
        yield paragraph[start:end]
        start = end
    yield paragraph[start:]


def hold_out(sizes: Sequence[int], digests: Sequence[str], whole: bool) -> dict[str, list[int]]:
    """Which documents are for train, valid and test, by index: each for one alone.

    Whole documents are drawn in the order of their SHA-256, which depends on nothing but the text; of stretches the
    last ones are held out. ValueError when there are too few.
    """
    if len(sizes) < 3:
        raise ValueError(
            f"source: {len(sizes)} documents; there must be at least 3, one each for train, valid and test"
        )
    share = min(HELD_OUT * sum(sizes), MOST_HELD_OUT)
    order = sorted(range(len(sizes)), key=lambda i: digests[i]) if whole else list(reversed(range(len(sizes))))
    splits: dict[str, list[int]] = {}
    for split in ("test", "valid"):
        chosen: list[int] = []
        for i in order:
            taken = sum(sizes[j] for j in chosen)
            if taken >= share or len(order) - len(chosen) <= (2 if split == "test" else 1):
                break
            if not whole or taken + sizes[i] <= 2 * share:
                chosen.append(i)
        chosen = chosen or [min(order, key=lambda i: sizes[i])]  # each is too large: the smallest
        order = [i for i in order if i not in set(chosen)]
        splits[split] = sorted(chosen)
    return {"train": sorted(order), "valid": splits["valid"], "test": splits["test"]}
