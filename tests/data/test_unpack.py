"""Archives, well-meant or not: only the bytes asked for come out, no more than allowed, and every failure is told."""

import gzip
import io
import lzma
import random
import stat
import tarfile
import zipfile

import pytest

from data.errors import SourceError
from data.unpack import read_file, read_tar_member, read_zip_member

TEXT = random.Random(0).randbytes(40_000)
LIMIT = 100_000
BOMB = 300_000_000  # bytes of zeros: 300 kB as .gz


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, content in members:
            archive.writestr(member, content)
    return path


def tarred(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_each_kind_is_told_apart_by_its_first_bytes(tmp_path):
    for name, content in (("raw", TEXT), ("gz", gzip.compress(TEXT)), ("xz", lzma.compress(TEXT)), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        assert b"".join(read_file(tmp_path / name, LIMIT)) == (b"" if name == "empty" else TEXT)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = zipped(tmp_path / "zip", [("folder/", b""), ("folder/text", TEXT)], method)
        assert b"".join(read_file(path, LIMIT)) == TEXT == b"".join(read_zip_member(path, "text", LIMIT))


def test_the_limit_is_exact(tmp_path):
    (tmp_path / "raw").write_bytes(TEXT)
    (tmp_path / "gz").write_bytes(gzip.compress(TEXT))
    zipped(tmp_path / "zip", [("text", TEXT)])
    for name in ("raw", "gz", "zip"):
        assert b"".join(read_file(tmp_path / name, len(TEXT))) == TEXT
        with pytest.raises(SourceError, match="holds more than 39999 bytes"):
            list(read_file(tmp_path / name, len(TEXT) - 1))


def test_a_bomb_is_given_up_at_the_limit(tmp_path):
    def seen(pieces):
        count = 0
        with pytest.raises(SourceError, match=f"holds more than {LIMIT} bytes"):
            for piece in pieces:
                count += len(piece)
        return count

    zeros = bytes(BOMB)
    with gzip.open(tmp_path / "gz", "wb", compresslevel=1) as file:
        file.write(zeros)
    assert seen(read_file(tmp_path / "gz", LIMIT)) <= LIMIT
    assert seen(read_zip_member(zipped(tmp_path / "zip", [("text", zeros)]), "text", LIMIT)) <= LIMIT
    # In a .tar.gz already what comes before the file counts: it has to be unpacked to get there.
    path = tarred(tmp_path / "tar", [(member("top/other"), zeros), (member("top/text"), TEXT)])
    assert seen(read_tar_member(path, "text", LIMIT)) == 0


def test_names_and_links_in_archives_reach_nothing(tmp_path):
    (tmp_path / "secret").write_text("secret")
    outside = tmp_path / "outside"
    outside.mkdir()
    link = zipfile.ZipInfo("text")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = zipped(outside / "zip", [("../../evil", b"evil"), ("/tmp/evil", b"evil"), (link, str(tmp_path / "secret"))])
    assert b"".join(read_zip_member(path, "text", LIMIT)) == str(tmp_path / "secret").encode()
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        path = tarred(outside / "tar", [(member("top/text", kind, str(tmp_path / "secret")), b"")])
        with pytest.raises(SourceError, match="tar has no text"):
            list(read_tar_member(path, "text", LIMIT))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["outside", "secret"]
    assert sorted(file.name for file in outside.iterdir()) == ["tar", "zip"]


def test_which_file_of_a_zip_is_meant_must_be_clear(tmp_path):
    path = zipped(tmp_path / "zip", [("a/text", b"1"), ("b/text", b"2"), ("__MACOSX/._other", b""), ("other", b"3")])
    with pytest.raises(SourceError, match="holds 2 files called text, expected one"):
        list(read_zip_member(path, "text", LIMIT))
    with pytest.raises(SourceError, match="holds 0 files called none, expected one"):
        list(read_zip_member(path, "none", LIMIT))
    with pytest.raises(SourceError, match="holds 4 files, expected one"):
        list(read_file(path, LIMIT))
    assert b"".join(read_zip_member(path, "other", LIMIT)) == b"3"


def test_damage_of_any_kind_is_a_source_error(tmp_path):
    """Each file cut and with bytes changed at random: nothing but SourceError, or other bytes where no check sum is."""
    zipped(tmp_path / "zip", [("top/text", TEXT)])
    tarred(tmp_path / "tar", [(member("top/text"), TEXT)])
    (tmp_path / "gz").write_bytes(gzip.compress(TEXT))
    (tmp_path / "xz").write_bytes(lzma.compress(TEXT))
    rng, failures = random.Random(1), 0
    for name, read in (
        ("gz", lambda path: read_file(path, LIMIT)),
        ("xz", lambda path: read_file(path, LIMIT)),
        ("zip", lambda path: read_zip_member(path, "text", LIMIT)),
        ("tar", lambda path: read_tar_member(path, "text", LIMIT)),
    ):
        whole = (tmp_path / name).read_bytes()
        for _ in range(300):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                ends = rng.choice([range(200), range(len(whole) - 200, len(whole)), range(len(whole))])
                damaged[rng.choice(ends)] = rng.randrange(256)
            damaged = damaged[: rng.randrange(len(damaged))] if rng.random() < 0.3 else damaged
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                list(read(tmp_path / "damaged"))
            except SourceError as error:
                failures += 1
                assert str(error).isprintable()
    assert failures > 600


def test_a_folder_or_a_missing_file_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(SourceError, match="can't be read"):
            list(read_file(path, LIMIT))
        with pytest.raises(SourceError, match="can't be read"):
            list(read_zip_member(path, "text", LIMIT))
