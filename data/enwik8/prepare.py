"""enwik8: the first 100 000 000 bytes of an English Wikipedia dump of 2006, split 90M / 5M / 5M for language models.

    python data/enwik8/prepare.py [--source FILE] [--out DIR] [--force] [--verify]

Writes train.bin, valid.bin and test.bin (raw bytes, so the vocabulary is 256 at most) and meta.json (sizes, SHA-256
of the whole and of each split, where it came from). Does nothing when they are already there.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.dataset import DataSet
from data.errors import SourceError
from data.fetch import Sdist, Url
from data.unpack import read_file

SPLITS = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}  # bytes
_MIRROR = "https://raw.githubusercontent.com/lucidrains/titans-pytorch/cc016ebca455a003749be4cab715acd88fea4d38"
_MAX_BYTES = 100_000_000


def cut(path: Path, folder: Path, splits: Mapping[str, int] = SPLITS) -> dict[str, dict[str, int]]:
    """Cut what `path` holds into SPLIT.bin of `splits` (split -> bytes) in `folder`. SourceError for another length."""
    total, done = sum(splits.values()), 0
    pieces = read_file(path, max_bytes=total)
    piece = b""
    for split, missing in splits.items():
        with open(folder / f"{split}.bin", "wb") as file:
            while missing:
                piece = piece or next(pieces, b"")
                if not piece:
                    raise SourceError(f"{done} bytes, expected {total}")
                part, piece = piece[:missing], piece[missing:]
                file.write(part)
                missing -= len(part)
                done += len(part)
    for _ in pieces:  # nothing must be left, and the end of a damaged archive may be
        pass
    return {}


ENWIK8 = DataSet(
    name="enwik8",
    folder=Path(__file__).resolve().parent,
    files={split: f"{split}.bin" for split in SPLITS},
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    sources=(
        Url("http://mattmahoney.net/dc/enwik8.zip", _MAX_BYTES),
        Url(f"{_MIRROR}/data/enwik8.gz", _MAX_BYTES),
        Sdist("titans-pytorch", "0.5.1", "data/enwik8.gz", backend="hatchling.build", max_bytes=_MAX_BYTES),
    ),
    read=cut,
    local="the 100 000 000 bytes of enwik8 as .zip, .gz, .xz or raw",
)

if __name__ == "__main__":
    sys.exit(ENWIK8.main())
