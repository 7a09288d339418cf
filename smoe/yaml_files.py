"""YAML as configurations use it: flat, each key once, 1e-4 a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice (YAML's reader would silently keep the last one) and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # not <<: *other
        keys = [self.construct_object(key, deep=True) for key in given]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping. ValueError in one line when it is missing, not YAML, not a mapping or repeats a key."""
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} holds a {type(values).__name__}, expected lines `field: value`")
    return values


def from_yaml(text: str) -> Any:
    """The inverse of :func:`to_yaml`. Raises yaml.YAMLError; for a file use :func:`load_yaml`."""
    return yaml.load(text, _Loader) or {}


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain data as YAML, fields in their own order; floats come back exactly."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
