"""HotpotQA: questions that take two paragraphs of Wikipedia to answer, each with ten of them (the distractor setting).

    python data/hotpotqa/prepare.py [--source FILE|FOLDER] [--subquestions FILE] [--out DIR] [--force] [--verify]

Without --source: the authors' train (90 447 questions, 566 MB) and, for the test, their dev (7405), since the answers
of their test are not public. --source takes these two files, or any other questions in their format, such as a sample:
a file (.json, .jsonl, packed or not) or a folder of them. Files that are not the authors' two are put together, and a
quarter of the questions, by the hash of their id, is the test.

For the compositionality gap there are questions with the two single-hop questions that they are made of: those of
MoreHopQA, about a third of them HotpotQA's, or --subquestions FILE in the same format. They come with their two
paragraphs, and are taken out of train.

Writes train.jsonl, test.jsonl, multi_hop.jsonl, single_hop.jsonl (two for each line of multi_hop) and meta.json, which
counts the questions of each file, and those whose answer is yes, no or stands in the context. A line is

    {"question": "...", "answer": "...", "type": "bridge", "titles": ["..."], "context": "...", "span": [17, 28]}

The context is the paragraphs, each after its title, one per line; span is the place of the answer in it in characters,
or null. Does nothing when the files are already there, from the same source
and with the same single-hop questions.

Yang et al. 2018, "HotpotQA: A Dataset for Diverse, Explainable Multi-hop Question Answering"; Schnitzler et al. 2024,
"MoreHopQA: More Than Multi-hop Reasoning".
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.dataset import DataSet
from data.errors import SourceError, printable
from data.fetch import Folder, Url
from data.folder import sha256_of
from data.unpack import read_file, text_of

PARTS = {"train": "hotpot_train_v1.1.json", "test": "hotpot_dev_distractor_v1.json"}  # the authors' names
SHA256 = {
    "train": "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
    "test": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
}
SUBQUESTIONS = "morehopqa_final_150samples.json"
SPLITS = ("train", "test", "multi_hop", "single_hop")
TEST_SHARE = 0.25  # of questions that come without the authors' split
_HOME = "http://curtis.ml.cmu.edu/datasets/hotpot"
_MOREHOPQA = "https://raw.githubusercontent.com/Alab-NII/morehopqa/27c72b1a220255093266a61f9e70af6ae981dc0b"
_MAX_BYTES = 600_000_000
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.xz", ".jsonl.xz")

Row = dict[str, Any]


def convert(path: Path, folder: Path, subquestions: Path | None = None) -> dict[str, dict[str, Any]]:
    """Write the questions at ``path`` to SPLIT.jsonl in ``folder``; return what meta.json says of each.

    Raises SourceError for a file that is missing or damaged, the authors' with other bytes, a split without questions.
    """
    sub_file = subquestions or (path / SUBQUESTIONS if path.is_dir() else path.with_name(SUBQUESTIONS))
    if not sub_file.is_file():
        raise SourceError(f"there is no {sub_file.name} with the single-hop questions; name a file with --subquestions")
    composed = list(read_composed(sub_file, sub_file.name))
    files = {split: Counter() for split in SPLITS}
    multi, single = [row for row, _ in composed], [row for _, pair in composed for row in pair]
    files["multi_hop"][sub_file.name], files["single_hop"][sub_file.name] = len(multi), len(single)
    rows = {**_split(path, sub_file, files, composed), "multi_hop": multi, "single_hop": single}
    facts = {}
    for split in SPLITS:
        if not rows[split]:
            raise SourceError(f"no questions are left for {split}")
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for row in rows[split]:
                kept = {name: value for name, value in row.items() if name not in ("id", "gold")}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        facts[split] = _facts(rows[split]) | {"files": dict(files[split])}
    facts["multi_hop"]["named_sha256"] = sha256_of(subquestions) if subquestions else None
    return facts


def _split(path: Path, sub_file: Path, files: dict[str, Counter], composed: Sequence[Any]) -> dict[str, list[Row]]:
    """Train and test; counts in ``files`` what comes from where."""
    own = {key for row, _ in composed for key in (row["id"].partition("_")[0], row["question"])}
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    authors = path.is_dir() and all((path / part).is_file() for part in PARTS.values())
    found = [path / part for part in PARTS.values()] if authors else question_files(path, sub_file)
    seen = set()
    for file in found:
        if authors and sha256_of(file) not in SHA256.values():
            raise SourceError(f"{file.name} has not the SHA-256 of the authors' file; rename it if it is a sample")
        for row in read_questions(file, file.name):
            if row["id"] in seen:
                continue
            seen.add(row["id"])
            if authors:
                split = "train" if file.name == PARTS["train"] else "test"
            else:
                split = "test" if _share(row["id"]) < TEST_SHARE else "train"
            if split == "train" and not own.isdisjoint((row["id"], row["question"])):
                continue
            splits[split].append(row)
            files[split][file.name] += 1
    return splits


def _share(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def question_files(path: Path, sub_file: Path) -> list[Path]:
    """The files with questions at ``path``, itself or those in it by name. Raises SourceError when there are none."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.name.endswith(_SUFFIXES)]
    files = [file for file in files if file.name != SUBQUESTIONS and file.resolve() != sub_file.resolve()]
    if not files:
        raise SourceError(f"it has no {PARTS['train']}, and no other .json or .jsonl file with questions")
    return files


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    """How many examples; of how many the answer is yes or no, and how many can be answered from what is there."""
    yes_no = [row["answer"] in ("yes", "no") for row in rows]
    return {
        "examples": len(rows),
        "yes_or_no": sum(yes_no),
        "answerable": sum(said or row["span"] is not None for said, row in zip(yes_no, rows, strict=True)),
        "with_all_gold_paragraphs": sum(row["gold"] for row in rows),
    }


def read_questions(path: Path, name: str) -> Iterator[Row]:
    """The questions of the file at ``path``, in the authors' format, as rows. Raises SourceError."""
    return (_read(question, name, number, hotpot_row) for number, question in enumerate(_values(path, name), start=1))


def read_composed(path: Path, name: str) -> Iterator[tuple[Row, tuple[Row, Row]]]:
    """Each question that is composed of two, once, with these two: of MoreHopQA's format. Raises SourceError."""
    seen = set()
    for number, question in enumerate(_values(path, name), start=1):
        row, pair = _read(question, name, number, composed_rows)
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row, pair


def _values(path: Path, name: str) -> Iterator[Any]:
    """The values of a JSON list, or of JSON lines, one by one: all of train's at once would take gigabytes."""
    text = text_of(read_file(path, _MAX_BYTES), name)
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    position = space.match(text).end()
    is_list = text.startswith("[", position)
    position = space.match(text, position + is_list).end()
    number = 0
    while position < len(text) and not (is_list and text[position] == "]"):
        number += 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}, question {number}: {printable(error, 200)}") from None
        yield value
        position = space.match(text, position).end()
    if not number or (is_list and position >= len(text)):
        raise SourceError(f"{name} {'ends in the middle' if number else 'has no questions'}")


def _read(question: Any, name: str, number: int, make: Any) -> Any:
    try:
        return make(question)
    except KeyError as error:
        raise SourceError(f"{name}, question {number}: no {printable(error.args[0], 100)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{name}, question {number}: {printable(error, 200)}") from None


def hotpot_row(question: Mapping[str, Any]) -> Row:
    """A question of the authors' format. ValueError, KeyError or TypeError for one that can't be used."""
    supporting: dict[str, set[int]] = {}
    for title, number in question["supporting_facts"]:
        supporting.setdefault(title, set()).add(number)
    return _row(question["_id"], question, question["type"], question["context"], supporting)


def composed_rows(question: Mapping[str, Any]) -> tuple[Row, tuple[Row, Row]]:
    """The two-hop question under one of MoreHopQA, and its two single-hop ones, which have the same paragraphs."""
    whole = {"question": question["previous_question"], "answer": question["previous_answer"]}
    first, second, *_ = question["question_decomposition"]
    titles = [part["paragraph_support_title"] for part in (first, second)]
    rows = [
        _row(question["_id"], asked, kind, question["context"], dict.fromkeys(named))
        for asked, kind, named in (
            (whole, "multi_hop", titles),
            (first, "single_hop", titles[:1]),
            (second, "single_hop", titles[1:]),
        )
    ]
    return rows[0], (rows[1], rows[2])


def _row(
    name: Any,
    question: Mapping[str, Any],
    kind: Any,
    paragraphs: Iterable[Any],
    supporting: Mapping[str, set[int] | None],
) -> Row:
    """``supporting``: the title of each paragraph that supports the answer, and its sentences; None: all of them."""
    asked, answer = question["question"], question["answer"]
    titles, parts, gold, length = [], [], [], 0
    for title, sentences in paragraphs:
        for number, part in enumerate((f"{title}\n", *sentences)):
            if not isinstance(part, str) or not isinstance(title, str):
                raise ValueError(f"a paragraph or its title is {part!r}, not text")
            if number == 0 and parts:
                part = f"\n{part}"
            sentences_of = supporting.get(title, ())
            if number and (sentences_of is None or number - 1 in sentences_of):
                gold.append((length, length + len(part)))
            parts.append(part)
            length += len(part)
        titles.append(title)
    for field, value in (("_id", name), ("question", asked), ("answer", answer), ("type", kind)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{field} is {value!r}, expected text")
    context = "".join(parts)
    span = None if answer in ("yes", "no") else find_answer(context, answer, gold)
    row = {"id": name, "question": asked, "answer": answer, "type": kind, "titles": titles, "context": context}
    return row | {"span": span, "gold": supporting.keys() <= {*titles}}


def find_answer(context: str, answer: str, gold: Sequence[tuple[int, int]]) -> list[int] | None:
    """[start, end) in characters of the best place of ``answer`` in ``context``, whole words; None if there is none.

    The data has no place. The best one is in a sentence that supports the answer (``gold``), with capitals as in the
    answer, and the first of these.
    """
    pattern = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    found = [match.span() for match in re.finditer(pattern, context, re.IGNORECASE)]
    if not found:
        return None

    def rank(place: tuple[int, int]) -> tuple[bool, bool, int]:
        start, end = place
        supports = any(start >= first and end <= last for first, last in gold)
        return not supports, context[start:end] != answer.strip(), start

    return list(min(found, key=rank))


def hotpotqa(subquestions: Path | None = None) -> DataSet:
    """The data set, with the single-hop questions of ``subquestions`` (None: of the source)."""
    urls = {part: Url(f"{_HOME}/{part}", _MAX_BYTES, timeout=7200) for part in PARTS.values()}
    urls[SUBQUESTIONS] = Url(f"{_MOREHOPQA}/datasets/files/{SUBQUESTIONS}", _MAX_BYTES)

    def is_wanted(splits: Mapping[str, Any]) -> bool:
        named = sha256_of(subquestions) if subquestions else None
        return splits["multi_hop"].get("named_sha256") == named

    return DataSet(
        name="hotpotqa",
        folder=Path(__file__).resolve().parent,
        files={split: f"{split}.jsonl" for split in SPLITS},
        sha256=None,
        sources=(Folder(urls),),
        read=lambda path, folder: convert(path, folder, subquestions),
        local=f"a folder with {' and '.join(PARTS.values())}, or questions in their format",
        is_wanted=is_wanted,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    note = f"questions with their single-hop ones, in MoreHopQA's format (default: {SUBQUESTIONS} of the source)"
    parser.add_argument("--subquestions", type=Path, help=note)
    options, others = parser.parse_known_args(arguments)
    return hotpotqa(options.subquestions).main(others, [parser])


if __name__ == "__main__":
    sys.exit(main())
