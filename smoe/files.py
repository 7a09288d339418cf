"""Files that a crash can't leave half-written."""

from __future__ import annotations

import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Force a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str) -> None:
    """Replace `path` by `content` (UTF-8) so that a crash leaves either the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_path(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
