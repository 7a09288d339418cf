"""YAML as configurations use it: small, each key once, 1e-4 a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 18, 10_000, 50  # of a file
_INT_BITS = 64


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice (YAML's reader would silently keep the last one) and reads 1e-4 as a number.

    What an alias stands for counts as often as it is used: a few lines of aliases to aliases can mean billions of
    values.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = self.depth = 0
        self.sizes: dict[int, int] = {}  # values in a finished node, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        alias, before = self.check_event(yaml.AliasEvent), self.values
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.YAMLError("a value holds itself")
        self.values += self.sizes[id(node)] if alias else 1
        if self.values > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES} values")
        self.sizes.setdefault(id(node), self.values - before)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError("a value is not the mapping that it is said to be")
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # not <<: *other
        if any(not isinstance(key, yaml.ScalarNode) for key in given):
            raise yaml.YAMLError("a key is not a single word")
        seen = set()
        for key in (self.construct_object(key, deep=True) for key in given):
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node) if len(str(node.value)) <= 100 else 1 << _INT_BITS
        if value.bit_length() > _INT_BITS - 1:
            raise yaml.YAMLError(f"{str(node.value)[:30]}... is more than {_INT_BITS} bits hold")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. ValueError in one line when it is missing, not YAML, not a mapping or repeats a key."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"config: {path} has {size} bytes, expected at most {MAX_BYTES}")
        values = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} holds a {type(values).__name__}, expected lines `field: value`")
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"config: {path} has the key {key!r}, expected lines `field: value`")
    return values


def from_yaml(text: str) -> Any:
    """The inverse of :func:`to_yaml`. Raises yaml.YAMLError; for a file use :func:`load_yaml`."""
    try:
        return yaml.load(text, _Loader) or {}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # PyYAML's own, of a value that does not fit its tag: `!!bool x`, a 13th month.
        raise yaml.YAMLError(f"a value does not fit its type ({type(error).__name__}: {str(error)[:100]})") from None


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain data as YAML, fields in their own order; floats come back exactly."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
