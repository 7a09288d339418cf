"""What is said of a wrong flag or field, in one line. A command without a mistake never comes here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def describe_type(hint: Any) -> str:
    """A type annotation in a user's words, e.g. ``one of a, b`` for a Literal."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list like [x, y] of {describe_type(get_args(hint)[0])}"
    return _WORDS.get(hint) or " or ".join(map(describe_type, get_args(hint))) or hint.__name__


def no_such_field(name: str, hints: Mapping[str, Any], shown: str) -> ValueError:
    """The error for ``name``, which is none of ``hints``; ``shown``: how the user wrote it."""
    close = difflib.get_close_matches(str(name), hints, n=1)
    advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(hints))}"
    return ValueError(f"{shown}: no such field; {advice}")


def explain(message: str, hints: Mapping[str, Any]) -> str:
    """jsonargparse's message of many lines as ``field: value, expected ...``."""
    found = re.search(r'(?:key "|argument --)(\w+)', message)
    if found is None or found[1] not in hints:
        return " ".join(message.split())
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    return f"{found[1]}: {repr(got[1]) if got else 'no value'}, expected {describe_type(hints[found[1]])}"
