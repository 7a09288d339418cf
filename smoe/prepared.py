"""A folder that a data/*/prepare.py filled: meta.json, and a file per split with the SHA-256 that meta.json holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import fingerprint
from .json_files import load_json


def read_prepared(
    folder: Path,
    advice: str,
    splits: Iterable[str],
    fields: Mapping[str, type | tuple[type, ...]],
    check: Callable[[dict[str, Any]], None] = lambda meta: None,
) -> dict[str, Any]:
    """The content of meta.json. The files of ``splits`` are read once, so a record never names data that they are not.

    Args:
        advice: the command that fills the folder, for messages.
        fields: what meta.json has beside ``splits``, and the type or types of each.
        check: raises ValueError, KeyError, TypeError or AttributeError for content that can't be used.

    Raises ValueError, in one line, when the folder is not prepared, lacks a split, or holds other bytes.
    """
    path = folder / "meta.json"
    try:
        meta = load_json(path)
        for name, kind in fields.items():
            if not isinstance(meta[name], kind) or isinstance(meta[name], bool):
                raise ValueError(f"{name} is {str(meta[name])[:100]!r}")
        there = list(meta["splits"])
        files = {name: (part["file"], part["sha256"]) for name, part in meta["splits"].items() if name in splits}
        if elsewhere := [f for f, _ in files.values() if not f or Path(f).name != f or not f.isprintable()]:
            raise ValueError(f"file is {elsewhere[0]!r}, not a name")
        check(meta)
    except OSError as error:
        raise ValueError(f"data: no prepared data set in {folder} ({error.strerror}); {advice}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"data: {path} is damaged ({reason}); {advice} --force") from None
    for name in splits:
        if name not in files:
            raise ValueError(f"data: {folder} has no {name}; it has {', '.join(there)}")
        file, sha256 = files[name]
        check_file(folder / file, sha256, advice)
    return meta


def check_file(file: Path, sha256: str, advice: str) -> None:
    """ValueError, in one line, unless the file is there and has this SHA-256."""
    if not os.path.isfile(file):  # Path.is_file raises an error for a name that is too long
        raise ValueError(f"data: {file} is missing; {advice} --force")
    found = fingerprint(file)
    if found["sha256"] != sha256:
        raise ValueError(f"data: {file}, {found['size']:,} bytes, has not the SHA-256 of meta.json; {advice} --force")
