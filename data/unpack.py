"""The bytes inside a file, whether it is .gz, .xz, .zip or raw, told apart by its first bytes.

Nothing is extracted: one member's bytes are streamed to the caller, who says where they go. Names and links inside an
archive can therefore not reach any other file. `max_bytes` bounds what comes out, however small the archive is.
"""

import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from data.errors import SourceError, printable
from data.folder import CHUNK

_DAMAGED = (OSError, EOFError, RuntimeError, ValueError, LookupError, OverflowError, struct.error, zlib.error)
_DAMAGED += (lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)


def read_file(path: Path, max_bytes: int) -> Iterator[bytes]:
    """What `path` holds, in pieces: raw, or unpacked from .gz, .xz or a .zip with one file.

    Raises SourceError when it can't be read, its compressed data is damaged, or it holds more than `max_bytes`.
    """
    with _reading():
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
                if len(names) != 1:
                    raise SourceError(f"the .zip holds {len(names)} files, expected one")
                with archive.open(names[0]) as stream:
                    yield from _pieces(stream, max_bytes)
            return
        packed = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}
        with packed.get(magic[:2], open)(path, "rb") as stream:
            yield from _pieces(stream, max_bytes)


def text_of(pieces: Iterable[bytes], name: str) -> str:
    """The UTF-8 text that ``pieces`` are together. Raises SourceError, which begins with ``name``, also for theirs."""
    try:
        return b"".join(pieces).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8 text (byte {error.start})") from error
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from error


def read_zip_member(path: Path, name: str, max_bytes: int) -> Iterator[bytes]:
    """What the one file called `name`, in whatever folder of the .zip at `path`, holds, in pieces.

    Raises SourceError when there is no such file or more than one, and for the reasons of `read_file`.
    """
    with _reading(), zipfile.ZipFile(path) as archive:
        found = [entry for entry in archive.infolist() if PurePosixPath(entry.filename).name == name]
        if len(found) != 1:
            raise SourceError(f"the .zip holds {len(found)} files called {name}, expected one")
        with archive.open(found[0]) as stream:
            yield from _pieces(stream, max_bytes)


def read_tar_member(path: Path, name: str, max_bytes: int) -> Iterator[bytes]:
    """What the file `name`, relative to the .tar.gz's top folder, holds, in pieces.

    `max_bytes` bounds all of the archive up to the end of that file: to find it, what comes before is unpacked too.
    Raises SourceError when there is no such file (a link is none), and for the reasons of `read_file`.
    """
    with _reading(), gzip.open(path) as unpacked:
        with tarfile.open(fileobj=_Bounded(unpacked, max_bytes), mode="r|") as archive:
            for member in archive:
                if member.isfile() and member.name.partition("/")[2] == name:
                    yield from _pieces(archive.extractfile(member), max_bytes)
                    return
    raise SourceError(f"{path.name} has no {name}")


class _Bounded:
    """A stream that may be read up to `max_bytes`."""

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self.stream, self.max_bytes, self.left = stream, max_bytes, max_bytes

    def read(self, size: int) -> bytes:
        piece = self.stream.read(size)
        self.left -= len(piece)
        if self.left < 0:
            raise SourceError(f"holds more than {self.max_bytes} bytes")
        return piece


def _pieces(stream: IO[bytes], max_bytes: int) -> Iterator[bytes]:
    bounded = _Bounded(stream, max_bytes)
    while piece := bounded.read(CHUNK):
        yield piece


@contextmanager
def _reading() -> Iterator[None]:
    """What the libraries raise for a file that can't be read or is damaged, as SourceError."""
    try:
        yield
    except _DAMAGED as error:
        raise SourceError(f"can't be read: {printable(error)}") from error
