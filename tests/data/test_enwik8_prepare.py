"""enwik8: fetched from the first mirror that holds it, checked, split, and left alone when it is there."""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.enwik8.prepare import ENWIK8, WITHOUT_NEWLINES, cut, main
from data.errors import DownloadError
from data.fetch import LocalPath, Url
from transformer_xl.data import load_data

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data/enwik8/prepare.py"

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

SMALL = replace(ENWIK8, sha256=SHA256, read=lambda path, folder: cut(path, folder, SPLITS))
MAX_BYTES = 10 * len(RAW)


def prepare(out, *sources):
    return SMALL.prepare(out, sources)


def urls(site, *names):
    return [Url(f"{site}/{name}", MAX_BYTES) for name in names]


def run(*arguments, sources=()):
    return replace(SMALL, sources=sources).main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def site(serve):
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


def test_third_mirror_works(site, tmp_path):
    meta = prepare(tmp_path, *urls(site, "404", "wrong", "good.zip", "404"))
    assert meta["source"] == f"{site}/good.zip"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["meta.json", "test.bin", "train.bin", "valid.bin"]
    data, _ = load_data(tmp_path)
    assert {split: bytes(part) for split, part in data.items()} == {
        "train": RAW[:9000],
        "valid": RAW[9000:10_000],
        "test": RAW[10_000:],
    }
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    assert meta["sha256"] == SHA256 and meta["bytes"] == len(RAW)
    assert meta["splits"]["test"] == {
        "file": "test.bin",
        "bytes": 240,
        "sha256": hashlib.sha256(RAW[10_000:]).hexdigest(),
    }


def test_all_failures_are_named_in_one_line(serve, site, tmp_path):
    mirrors = [*urls(site, "404", "wrong", "short"), Url(f"{site}/slow", MAX_BYTES, timeout=0.2)]
    with serve(lambda request: None) as closed:
        pass
    with pytest.raises(DownloadError) as error:
        prepare(tmp_path, *mirrors, Url(f"{closed}/x", MAX_BYTES), Url("no address", MAX_BYTES))
    message = str(error.value)
    assert "\n" not in message
    for part in [f"{site}/404: HTTP 404", f"{site}/wrong: SHA-256 is ", f"expected {SHA256}", "Connection refused"]:
        assert part in message
    assert f"{site}/short: connection closed after {len(RAW)} of {len(RAW) + 500} bytes" in message
    assert f"{site}/slow: took longer than 0.2 s" in message
    assert "no address: unknown url type" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_local_source_of_each_format(kind, tmp_path):
    source = tmp_path / "some_name"  # what it is shows in the first bytes, whatever it is called
    source.write_bytes(PACKED[kind])
    out = tmp_path / "out" / "enwik8"
    prepare(out, LocalPath(source))
    assert (out / "train.bin").read_bytes() + (out / "valid.bin").read_bytes() + (out / "test.bin").read_bytes() == RAW
    assert source.read_bytes() == PACKED[kind]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected 10240"),
        (RAW[:-1], "10239 bytes, expected 10240"),
        (RAW + b"x", "holds more than 10240 bytes"),
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
        prepare(tmp_path / "out", LocalPath(tmp_path / "source"))
    assert list((tmp_path / "out").iterdir()) == []


def test_unreachable_mirrors_end_with_1_and_advice(site, tmp_path, capsys):
    assert run("--out", tmp_path / "out", sources=urls(site, "404", "wrong")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{site}/404: HTTP 404" in error and f"{site}/wrong: SHA-256" in error and "with --source: the 100" in error


def test_failure_keeps_what_was_there(tmp_path):
    (tmp_path / "good").write_bytes(RAW)
    prepare(tmp_path / "out", LocalPath(tmp_path / "good"))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    with pytest.raises(DownloadError, match="no such file"):
        prepare(tmp_path / "out", LocalPath(tmp_path / "missing"))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_prepared_or_not(tmp_path):
    (tmp_path / "good").write_bytes(RAW)
    out = tmp_path / "out"
    assert not SMALL.is_prepared(out)
    prepare(out, LocalPath(tmp_path / "good"))
    assert SMALL.is_prepared(out) and SMALL.is_prepared(out, contents=True)
    assert not ENWIK8.is_prepared(out), "other data under the same name"

    (out / "valid.bin").write_bytes(bytes(1000))
    assert SMALL.is_prepared(out) and not SMALL.is_prepared(out, contents=True)
    (out / "valid.bin").write_bytes(bytes(999))
    assert not SMALL.is_prepared(out)
    prepare(out, LocalPath(tmp_path / "good"))
    assert SMALL.is_prepared(out, contents=True)
    # A record that agrees with files of another content.
    meta = json.loads((out / "meta.json").read_text())
    (out / "test.bin").write_bytes(bytes(240))
    meta["splits"]["test"]["sha256"] = hashlib.sha256(bytes(240)).hexdigest()
    (out / "meta.json").write_text(json.dumps(meta))
    assert SMALL.is_prepared(out) and not SMALL.is_prepared(out, contents=True)
    for damaged in ("", "[]", '{"sha256": 1}', json.dumps({"sha256": SHA256, "splits": []})):
        (out / "meta.json").write_text(damaged)
        assert not SMALL.is_prepared(out)


def test_the_record_never_describes_other_data(tmp_path, monkeypatch):
    (tmp_path / "good").write_bytes(RAW)
    out = tmp_path / "out"
    (tmp_path / "other").write_bytes(RAW[::-1])
    replace(SMALL, sha256=hashlib.sha256(RAW[::-1]).hexdigest()).prepare(out, [LocalPath(tmp_path / "other")])
    monkeypatch.setattr(os, "replace", lambda source, target: sys.exit("killed"))
    with pytest.raises(SystemExit):
        prepare(out, LocalPath(tmp_path / "good"))
    assert not (out / "meta.json").exists()


def test_command_is_idempotent_and_silent(tmp_path, capsys):
    source, out = tmp_path / "enwik8.xz", tmp_path / "out"
    source.write_bytes(PACKED["xz"])
    assert run("--source", source, "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and str(out) in stderr
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    source.unlink()
    for flags in ((), ("--verify",)):
        assert run("--source", source, "--out", out, *flags) == 0
        assert capsys.readouterr() == ("", "")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == times

    assert run("--source", source, "--out", out, "--force") == 2
    assert "no such file" in capsys.readouterr().err
    source.write_bytes(RAW)
    (out / "test.bin").write_bytes(bytes(240))
    assert run("--source", source, "--out", out, "--verify") == 0
    assert (out / "test.bin").read_bytes() == RAW[10_000:]


def test_real_constants_reject_small_data(tmp_path, capsys):
    (tmp_path / "source").write_bytes(RAW)
    assert ENWIK8.main(["--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "10240 bytes, expected 100000000; it must be the 100 000 000 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [100, 5000, 9500])  # full at once, amid the train split, amid a download
def test_full_disk_leaves_nothing(limit, site, tmp_path, capsys):
    (tmp_path / "source").write_bytes(RAW)
    mirrors = urls(site, "good.raw", "good.gz")
    flags = ["--source", tmp_path / "source"] if limit < 9000 else []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = run("--out", tmp_path / "out", *flags, sources=mirrors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert f"can't write to {tmp_path / 'out'}: File too large" in capsys.readouterr().err.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(self, folder):
        (folder / "part").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalPath, "fetch", interrupt)
    assert run("--out", tmp_path / "out", sources=[LocalPath(SCRIPT)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_sigterm_leaves_nothing_and_ends_the_download(serve, tmp_path):
    def stall(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(RAW)))
        request.end_headers()
        request.wfile.write(RAW[:5000])
        request.wfile.flush()
        reached.set()
        with contextlib.suppress(ConnectionError):
            request.connection.recv(1)  # until the other end closes
        ended.set()

    reached, ended = threading.Event(), threading.Event()
    with serve(stall) as url:
        code = f"""
            import sys
            from dataclasses import replace
            from data.enwik8.prepare import ENWIK8
            from data.fetch import Url
            sys.exit(replace(ENWIK8, sources=[Url({url + "/x"!r}, 100_000)]).main(["--out", {str(tmp_path)!r}]))
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
        assert ended.wait(10), "the download went on"
    assert process.returncode == 143 and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


LINES = b"one\ntwo\n\n" * 10 + b"three\n" * 5  # 120 bytes


@pytest.mark.parametrize("pieces", [7, 1 << 20])
def test_newlines_are_dropped_after_splitting(pieces, tmp_path, monkeypatch):
    """The splits are cut at the same places as with newlines, so that each has the same text."""
    monkeypatch.setattr("data.unpack.CHUNK", pieces)
    splits = {"train": 95, "valid": 20, "test": 5}
    parts = {"train": LINES[:95], "valid": LINES[95:115], "test": LINES[115:]}
    wanted = {split: part.replace(b"\n", b"") for split, part in parts.items()}
    small = replace(
        WITHOUT_NEWLINES,
        sha256=hashlib.sha256(b"".join(wanted.values())).hexdigest(),
        read=lambda path, folder: cut(path, folder, splits, drop=b"\n"),
    )
    (tmp_path / "source").write_bytes(LINES)
    meta = small.prepare(tmp_path / "out", [LocalPath(tmp_path / "source")])
    data, record = load_data(tmp_path / "out")
    assert {split: bytes(part) for split, part in data.items()} == wanted
    assert record == {"name": "enwik8 without newlines", "sha256": small.sha256}
    assert {split: part["dropped"] for split, part in meta["splits"].items()} == {
        split: part.count(b"\n") for split, part in parts.items()
    }
    # The same from the folder of the variant with newlines.
    (tmp_path / "keep").mkdir()
    assert cut(tmp_path / "source", tmp_path / "keep", splits) == {}
    small.prepare(tmp_path / "again", [LocalPath(tmp_path / "keep")])
    assert small.is_prepared(tmp_path / "again", contents=True) and not ENWIK8.is_prepared(tmp_path / "again")


def test_newlines_of_the_real_data(tmp_path):
    """As many tokens as in Dai et al.'s pipeline and in the release, with their vocabulary of 204."""
    if not ENWIK8.is_prepared(ENWIK8.folder):
        pytest.skip("no enwik8 here: python data/enwik8/prepare.py")
    assert main(["--newlines", "drop", "--out", str(tmp_path)]) == 0
    splits, _ = load_data(tmp_path)
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 88_982_818,
        "valid": 4_945_742,
        "test": 4_943_417,
    }
    values = set().union(*(np.unique(part).tolist() for part in splits.values()))
    assert len(values) == 204 and ord("\n") not in values
    assert json.loads((tmp_path / "meta.json").read_text())["source"] == str(ENWIK8.folder)


def test_the_variant_without_newlines_has_a_folder_of_its_own(tmp_path, capsys):
    assert WITHOUT_NEWLINES.folder == ROOT / "data/enwik8-no-newlines"
    (tmp_path / "source").write_bytes(RAW)
    arguments = ["--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    assert main(["--newlines", "drop", *arguments]) == 2
    assert "error: enwik8 without newlines: source: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--newlines", "no", *arguments])
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--newlines {keep,drop}" in capsys.readouterr().out


def test_script_runs_from_anywhere_and_says_what_to_do(tmp_path):
    command = [sys.executable, "-I", str(SCRIPT), "--source", "none", "--out", "out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert error.startswith("error: enwik8: source: none: no such file") and "it must be the 100 000 000" in error


def test_a_name_with_escapes_is_told_printably(tmp_path, capsys):
    assert run("--source", "no\x1b[2J\nfile", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.split("\n")[-2]
    assert error.startswith("error: enwik8: source: no [2J file: no such file") and error.isprintable()


def test_preparing_needs_nothing_installed(tmp_path):
    command = [sys.executable, "-S", "-I", str(SCRIPT), "--source", "none", "--out", "out"]  # no site-packages
    assert subprocess.run(command, capture_output=True, timeout=120, cwd=tmp_path).returncode == 2
