"""Files that a crash can't leave half-written, and what shows that one has changed."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any


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


def lock_file(path: Path) -> int:
    """Creates ``path`` and locks it: the descriptor that holds the lock until it is closed or this process ends.

    Raises ValueError when another process holds it, which is named. A file system without locks locks nothing.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        os.close(descriptor)
        raise ValueError(f"{path.parent} is in use by {holder or 'another process'}; wait for it or stop it") from None
    except OSError:  # no locks here
        return descriptor
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(file, "rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def hash_json(content: Any) -> str:
    """The SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
