"""A folder of prepared data: written aside, moved in when it is whole, checked by SHA-256."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

CHUNK = 1 << 20  # bytes read at a time
RECORD = "meta.json"
PARTIAL_PREFIX = ".partial-"
ABANDONED_SECONDS = 24 * 3600.0  # where the file system has no locks


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for files that are not whole yet (same file system, so that moving them out is atomic).

    It is removed afterwards, whatever happens. Its owner locks it, so those that a killed process left are known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):  # nobody takes a new folder for a left one before it is locked
        for old in folder.glob(f"{PARTIAL_PREFIX}*"):
            if _is_abandoned(old):
                shutil.rmtree(old, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=folder))
        lock = os.open(own, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(partial: Path) -> bool:
    try:
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
        return True
    except (BlockingIOError, FileNotFoundError):  # in use, or just finished
        return False
    except OSError:  # no locks here
        return time.time() - partial.stat().st_mtime > ABANDONED_SECONDS


def move_in(partial: Path, out: Path, files: Sequence[str], same: bool = False) -> None:
    """Move `files` and the record, all of them whole, from `partial` to `out`.

    The old record goes first and the new one comes last: while there is a record, it is true. `same` says that `out`
    holds the same data already (another process was faster): its record stays, since somebody may be reading it.
    """
    if not same:
        (out / RECORD).unlink(missing_ok=True)
    for file in (*files, RECORD):
        os.replace(partial / file, out / file)


def read_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, in pieces."""
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def sha256_of(*files: Path) -> str:
    """SHA-256 of files, one after the other, as 64 hex digits."""
    digest = hashlib.sha256()
    for file in files:
        for piece in read_pieces(file):
            digest.update(piece)
    return digest.hexdigest()
