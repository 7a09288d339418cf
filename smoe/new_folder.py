"""A folder that a command writes whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import fsync_path


@contextmanager
def new_folder(path: Path, name: str) -> Iterator[Path]:
    """A folder to fill in the block, which takes the place of `path` when the block ends; an error leaves nothing.

    Raises ValueError, naming the option `name`, when `path` is there and is no empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{name}: {path} is there already; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.absolute().with_name(f".{path.absolute().name}.tmp-{os.getpid()}")
    aside.mkdir()
    try:
        yield aside
        os.replace(aside, path)
        fsync_path(path.absolute().parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
