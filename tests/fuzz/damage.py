"""Damage to a good file: bytes cut, repeated or exchanged for hostile ones; JSON values exchanged for absurd ones."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

ABSURD: list[Any] = [None, True, -1, 0, 0.5, 2**31, 2**63, 10**400, -(10**400), 1e308, float("inf"), float("nan"), ""]
ABSURD += ["x", "x" * 5000, "../../etc/passwd", "\x1b[2J\n", "\ud800", "1e999", "10" * 3000, [], [[]], {}, {"": {}}]
ABSURD += [[1, "a", None], {"a": float("nan")}, "number0", "nan", "__class__", 10**18]
TOKENS = [
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x00" * 8,
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"\r\n",
    b"\n",
]
TOKENS += [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 6000,
    b"NaN",
    b"-Infinity",
    b"1e999",
    b'"',
    b"'",
    b",",
    b"\t",
    b"}",
    b"]",
]
TOKENS += [
    b"!!bool x",
    b"= ",
    b"!!int ",
    b"&a [*a]",
    b"*a",
    b"<<: ",
    b"? ",
    b"- ",
    b": ",
    b"!!python/object:os.system ",
]
TOKENS += [
    b"!!timestamp ",
    b"2001-13-45",
    b"!!set ",
    b"!!omap ",
    b"1:59:59",
    b"0x" + b"f" * 6000,
    b"!!binary x",
    b"!!map ",
]
TOKENS += [
    b"cos\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"R",
    b"b",
    b"\x81",
    b"\x82\x01",
    b"Q",
    b"h\x00",
    b"0",
    b"2",
]
TOKENS += [
    b"r\xff\xff\xff\xff",
    b"]",
    b"a",
    b"e",
    b"s",
    b"u",
    b"(",
    b"t",
    b"}",
    b"N",
    b".",
    b"\x8f",
    b"X\xff\xff\xff\x7f",
]
TOKENS += [
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"&lol;",
    b"<!ENTITY a '&a;&a;'>",
    b"</page>",
    b"<text>",
    b"{{",
    b"[[",
]


def damaged(good: list[bytes], plain: bool) -> st.SearchStrategy[bytes]:
    """Damaged copies of good contents. plain: they are JSON, whose values are exchanged too."""
    cuts = st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from([*TOKENS, b""]) | st.binary(max_size=8))
    cut = st.builds(_damage, st.sampled_from(good), st.lists(cuts, min_size=1, max_size=4), st.booleans())
    kinds = [cut, st.binary(max_size=200), st.lists(st.sampled_from(TOKENS), max_size=6).map(b"".join)]
    if plain:
        places = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(ABSURD)), min_size=1, max_size=3)
        kinds += [st.builds(_exchange, st.sampled_from(good), places)] * 2
    return st.one_of(kinds)


def _damage(good: bytes, cuts: list[tuple[float, int, bytes]], ends: bool) -> bytes:
    for where, length, token in cuts:
        at = int(where * len(good))
        good = good[:at] + token + good[at + length :]
    return good[: int(cuts[0][0] * len(good))] if ends and cuts[0][1] > 20 else good


def _exchange(good: bytes, places: list[tuple[int, Any]]) -> bytes:
    value = json.loads(good)
    for number, absurd in places:
        found = list(_places(value))
        holder, key = found[number % len(found)] if found else ([value], 0)
        if number % 7 == 0 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = copy.deepcopy(absurd)
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])
