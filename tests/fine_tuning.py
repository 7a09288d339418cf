"""Small prepared sets of word problems and questions, and a tokenizer, for tests of fine-tuning and of its scripts."""

import json
from collections.abc import Sequence
from pathlib import Path

from example_data import write_examples

from bert.finetune import _SPECIAL

NAMES = ("ann", "ben", "cleo", "dan")
THINGS = ("pens", "cups", "nuts", "hats", "figs")


def tokenizer(model: str, folder: Path, more: Sequence[str] = ()) -> Path:
    """A tokenizer.json of whole words, ``more`` besides."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "it has and gets more loses how many left in all ? . what is a boxes of each next to number yes no".split()
    vocabulary = [*_SPECIAL[model].values(), *words, *NAMES, *THINGS, *map(str, range(10)), *more]
    pieces = {token: i for i, token in enumerate([*vocabulary, *(f"##{i}" for i in range(10))])}
    made = Tokenizer(models.WordPiece(pieces, unk_token=_SPECIAL[model]["unknown"]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(_SPECIAL[model].values()))
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def problem(i: int) -> dict:
    """The words say which operation it is; the third kind has a number that is not needed."""
    name, thing = NAMES[i % 4], THINGS[i % 5]
    a, b, c = 3.0 + i % 13, 1.0 + i % 7, 2.0 + i % 3
    kinds = (
        (f"{name} has number0 {thing} and gets number1 more . how many in all ?", [a, b], "+ number0 number1", a + b),
        (f"{name} has number0 {thing} and loses number1 . how many left ?", [a, b], "- number0 number1", a - b),
        (f"number0 boxes of number1 {thing} next to number2 . how many ?", [a, b, c], "* number0 number1", a * b),
        (f"what is number0 {thing} of {name} and 2 more ?", [a], "+ number0 2.0", a + 2),
    )
    question, numbers, equation, answer = kinds[(i // 4) % 4]
    return {"question": question, "numbers": numbers, "equation": equation, "answer": answer}


def question(i: int) -> dict:
    """The right choice is the thing that the question names."""
    answer = (i * 7) % 5
    choices = [THINGS[(i + j) % 5] for j in range(5)]
    text = f"{NAMES[i % 4]} gets {i % 9} {choices[answer]} . what is it ?"
    return {"id": f"q{i}", "question": text, "choices": choices, "answer": answer}


def paragraphs(i: int, kind: str | None = None) -> dict:
    """A question about three paragraphs as data/hotpotqa/prepare.py leaves it; the word after "is" answers it.

    Every fifth one is answered by yes or no, which nothing in the text tells; of another fifth the text has no answer.
    """
    name, thing = NAMES[i % 4], THINGS[(i * 7 // 3) % 5]
    kind = kind or ("comparison" if i % 5 == 4 else "bridge")
    texts = [f"{name} has {i % 9} boxes .", f"next to {name} {'has' if i % 5 == 3 else 'is'} {thing} ."]
    texts.insert(i % 3, f"{NAMES[(i + 1) % 4]} gets {i % 7} boxes and loses {i % 5} boxes .")
    titles = [text.split()[0] for text in texts]
    context = "\n".join(f"{title}\n{text}" for title, text in zip(titles, texts, strict=True))
    row = {
        "question": f"what of {i % 9} is next to {name} ?",
        "answer": thing,
        "type": kind,
        "titles": titles,
        "context": context,
    }
    if kind == "comparison":
        return {**row, "question": f"has {name} {i % 9} more {thing} ?", "answer": ("yes", "no")[i % 2], "span": None}
    found = f"is {thing}" in context
    start = context.rindex(thing)
    return {**row, "span": [start, start + len(thing)] if found else None}


def write_paragraphs(folder: Path) -> Path:
    rows = {"train": [paragraphs(i) for i in range(160)], "test": [paragraphs(i) for i in range(23)]}
    rows |= {"multi_hop": [paragraphs(i, "multi_hop") for i in range(6)]}
    rows |= {"single_hop": [paragraphs(i, "single_hop") for i in range(12)]}
    write_examples(folder, "hotpotqa", rows)
    meta = json.loads((folder / "meta.json").read_text())
    for part in meta["splits"].values():
        part |= {"yes_or_no": 1, "answerable": 1, "with_all_gold_paragraphs": 1, "files": {"a.json": part["examples"]}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_problems(folder: Path) -> Path:
    train, test = ([problem(i) for i in range(count)] for count in (160, 23))
    folds = (0, 1, "challenge")
    splits = {f"{fold}-train": train for fold in folds} | {f"{fold}-test": test for fold in folds}
    return write_examples(folder, "mawps", splits)


def write_questions(folder: Path) -> Path:
    train, test = ([question(i) for i in range(count)] for count in (160, 23))
    return write_examples(folder, "csqa", {"train": train, "test": test})
