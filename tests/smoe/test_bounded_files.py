"""JSON and YAML that nobody means: one line, at once, whatever is in them."""

import os
import time

import pytest

from smoe.errors import one_line
from smoe.json_files import load_json, parse_json
from smoe.yaml_files import MAX_BYTES, load_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 100_000, "nested more than 50 deep"),
        ("a: " + "{b: " * 60, "nested more than 50 deep"),
        ("a: " + "1" * 6000, "more than 64 bits"),
        ("a: 0x" + "f" * 6000, "more than 64 bits"),
        ("a: 1" + ":59" * 30, "more than 64 bits"),
        ("a: !!bool x", r"does not fit its type \(KeyError"),
        ("a: !!float x", r"does not fit its type \(ValueError"),
        ("a: 2001-13-45", r"does not fit its type \(ValueError"),
        ("a: =", "could not determine a constructor"),
        ("=: 1\n? [a]\n: 2", "a key is not a single word"),
        ("a: &a [*a]", "a value holds itself"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), "more than 10000"),
        (
            "a: &a {k: 1}\n"
            + "".join(
                f"{c}: &{c} {{<<: [*{p}, *{p}]}}\n"
                for p, c in zip("abcdefghijklmnopq", "bcdefghijklmnopqr", strict=True)
            ),
            "more than 10000",
        ),
        ("".join(f"a{i}: 1\n" for i in range(20_000)), "more than 10000 values"),
        ("a: !!python/object/apply:os.system [touch trap]", "could not determine a constructor"),
        ("1: 2", "has the key 1, expected lines"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: \x07", "special characters are not allowed"),
    ],
)
def test_absurd_yaml(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        load_yaml(tmp_path / "c.yaml")
    assert time.monotonic() - start < 10 and len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_yaml_of_gigabytes_and_not_utf8(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="cannot read"):
        load_yaml(tmp_path / "c.yaml")
    os.truncate(tmp_path / "c.yaml", 1 << 32)  # a sparse file: takes no room
    with pytest.raises(ValueError, match=f"has {1 << 32} bytes, expected at most {MAX_BYTES}"):
        load_yaml(tmp_path / "c.yaml")


def test_merges_anchors_and_numbers_are_read(tmp_path):
    text = "b: &b {a: 1e-4, c: .inf}\nm:\n  <<: *b\n  c: -9223372036854775807\nl: [0x10, 1_000, ~]\n"
    (tmp_path / "c.yaml").write_text(text)
    both = {"a": 1e-4, "c": float("inf")}
    read = load_yaml(tmp_path / "c.yaml")
    assert read == {"b": both, "m": both | {"c": -(2**63) + 1}, "l": [16, 1000, None]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 6000, "4300"),
        (b'"\xff"', r"not UTF-8 text \(byte 1\)"),
        (b"", "Expecting value"),
        (b'{"a": NaN}', "NaN is no number"),
    ],
)
def test_absurd_json(text, message, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        load_json(tmp_path / "a.json", nan=False)
    assert len(str(error.value)) < 310
    assert parse_json(b'{"a": [Infinity, -1e999]}', nan=False) == {"a": [float("inf"), -float("inf")]}


def test_what_a_file_says_reaches_no_terminal():
    assert one_line("a\x1b[2J\r\nb\u202ec") == "a [2J b c"
    assert one_line("x" * 5000) == "x" * 2000 + "..."
