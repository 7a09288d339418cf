"""Prefix equations: their values against Python's own arithmetic, and that nothing a model writes can do harm."""

import math
import random
from fractions import Fraction

import pytest
from commands import assert_main_refuses
from example_data import record_sha256, write_examples

from bert.equations import OPERATORS, EquationError, check, evaluate, is_constant, main, slot_index, solves


@pytest.mark.parametrize(
    ("equation", "numbers", "value"),
    [
        ("number0", [7.0], 7.0),
        ("- number0 number1", [3.0, 10.0], -7.0),
        ("/ number1 number0", [4.0, 10.0], 2.5),
        ("- - number0 number1 number2", [10.0, 3.0, 2.0], 5.0),
        ("- number0 - number1 number2", [10.0, 3.0, 2.0], 9.0),
        ("* / - number1 number0 number0 100.0", [8.0, 10.0], 25.0),
        ("+ -1.5 0.25", [], -1.25),
    ],
)
def test_values_by_hand(equation, numbers, value):
    assert evaluate(equation.split(), numbers) == value
    assert solves(equation.split(), numbers, value + 0.99e-4) and solves(equation.split(), numbers, value - 0.99e-4)
    assert not solves(equation.split(), numbers, value + 1.01e-4)


def tree(rng, depth):
    """A random equation: its tokens, and what Python computes for the same tree written in parentheses."""
    if depth == 0 or rng.random() < 0.2:
        number = rng.randrange(3)
        return [f"number{number}"], f"n[{number}]"
    sign = rng.choice("+-*")
    (left, a), (right, b) = tree(rng, depth - 1), tree(rng, depth - 1)
    return [sign, *left, *right], f"({a}{sign}{b})"


def test_random_trees_against_pythons_own_parser():
    rng = random.Random(0)
    for _ in range(300):
        tokens, text = tree(rng, 6)
        numbers = [float(rng.randrange(-9, 10)) for _ in range(3)]
        expected = eval(text, {"n": [Fraction(number) for number in numbers]})  # of this test's own making
        if abs(expected) < 2**53:
            assert evaluate(tokens, numbers) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("", "'' ends too early, 1 more operands are needed"),
        ("+ number0", "'+ number0' ends too early, 1 more"),
        ("* + number0", "2 more operands"),
        ("number0 number1", "'number0 number1' is complete before 'number1'"),
        ("number0 + number1", "complete before '+'"),
        ("+ number0 number2", "has number2, but the problem has 2 numbers"),
        ("/ number0 - number1 number1", "divides by zero"),
        ("/ number0 0.0", "divides by zero"),
        ("+ number0 x", "'x' is no operator, slot or number"),
        ("+ number0 1e5", "'1e5' is no operator"),
        ("+ number0 nan", "'nan' is no operator"),
        ("+ number0 inf", "'inf' is no operator"),
        ("+ number0 1_0", "'1_0' is no operator"),
        ("+ number0 __import__('os')", "no operator"),
        ("+ number0 number-1", "'number-1' is no operator"),
        ("+ number0 number9999999999999999999", "no operator"),
        ("+ number0 ٣", "no operator"),
        ("** number0 number1", "'**' is no operator"),
        ("* " * 40 + "999999999999999 " * 41, "is too large a number"),
        ("- " + ("* " * 40 + "999999999999999 " * 41) * 2, "is too large a number"),
    ],
)
def test_malformed_or_without_a_value_is_one_line_and_never_right(equation, message):
    tokens, numbers = equation.split(), [2.0, 1.0]
    with pytest.raises(EquationError) as error:
        evaluate(tokens, numbers)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200
    for answer in (0.0, 2.0, 3.0, math.inf, math.nan):
        assert not solves(tokens, numbers, answer)


def random_sequences(count: int) -> int:
    """``count`` random token sequences through everything; how many have a value."""
    rng = random.Random(1)
    words = [*OPERATORS, "number0", "number1", "number2", "number7", "0.0", "1.0", "100.0", "-3", "", "(", "end", "1e9"]
    words += ["eval", "number", "number0.5", "nan", "inf", "+-", "1.0.0", "\n", "\x00", "number٣"]
    good = words[:8]
    solved = 0
    for i in range(count):
        tokens = rng.choices(good if i % 2 else words, k=rng.randrange(12))
        numbers = rng.choices((0.0, 1.0, -2.5, 1e300, 3.0), k=rng.randrange(4))
        assert solves(tokens, numbers, 0.0) in (True, False)
        try:
            solved += math.isfinite(evaluate(tokens, numbers))
        except EquationError:
            pass
    return solved


def test_random_sequences_raise_nothing():
    assert random_sequences(100_000) > 1000


@pytest.mark.slow
def test_a_million_random_sequences_raise_nothing():
    assert random_sequences(1_000_000) > 10_000


def test_a_long_sequence_needs_no_recursion():
    long = ["+"] * 100_000 + ["number0"] * 100_001
    check(long, 1)
    assert evaluate(long, [1.0]) == 100_001


def test_tokens():
    assert [slot_index(t) for t in ("number0", "number12", "number", "+", "1.0")] == [0, 12, None, None, None]
    assert [is_constant(t) for t in ("100.0", "-3", "0.25", "number0", "", "1e3", "++1")] == [True] * 3 + [False] * 4


def test_problems_that_their_own_equation_does_not_solve_are_listed(tmp_path, capsys):
    row = {"question": "number0 of number1 ?", "numbers": [7.0, 2.0], "equation": "/ number0 number1", "answer": 3.5}
    rounded, other = row | {"answer": 3.0}, row | {"equation": "/ number0 - number1 number1"}
    splits = {"0-train": [row | {"answer": 9.0}], "0-test": [row, rounded], "1-test": [row, other]}
    data = write_examples(tmp_path / "mawps", "mawps", splits)
    main(["--data", str(data)])
    found = capsys.readouterr().out.splitlines()
    assert found[::2] == [
        "/ number0 number1 with 7, 2: 3.5, stored 3",
        "/ number0 - number1 number1 with 7, 2: '/ number0 - number1 number1' divides by zero, stored 3.5",
        "1 of 3 different problems are solved by their own equation",
    ]
    (data / "1-test.jsonl").write_text('{"question": 3}\n')
    record_sha256(data, "1-test")
    assert_main_refuses(main, ["--data", str(data)], "1-test.jsonl is damaged", capsys)
    data = write_examples(tmp_path / "sst2", "sst2", {"valid": []})
    assert_main_refuses(main, ["--data", str(data)], "has no fold with test problems", capsys)
