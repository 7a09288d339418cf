"""Small prepared sets of word problems and questions, and a tokenizer, for tests of fine-tuning and of its scripts."""

from collections.abc import Sequence
from pathlib import Path

from example_data import write_examples

from bert.finetune import _SPECIAL

NAMES = ("ann", "ben", "cleo", "dan")
THINGS = ("pens", "cups", "nuts", "hats", "figs")


def tokenizer(model: str, folder: Path, more: Sequence[str] = ()) -> Path:
    """A tokenizer.json of whole words, ``more`` besides."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "it has and gets more loses how many left in all ? . what is a boxes of each next to number".split()
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


def write_problems(folder: Path) -> Path:
    train, test = ([problem(i) for i in range(count)] for count in (160, 23))
    folds = (0, 1, "challenge")
    splits = {f"{fold}-train": train for fold in folds} | {f"{fold}-test": test for fold in folds}
    return write_examples(folder, "mawps", splits)


def write_questions(folder: Path) -> Path:
    train, test = ([question(i) for i in range(count)] for count in (160, 23))
    return write_examples(folder, "csqa", {"train": train, "test": test})
