"""enwik8: the first 100 000 000 bytes of an English Wikipedia dump of 2006, split 90M / 5M / 5M for language models.

    python data/enwik8/prepare.py [--newlines keep|drop] [--source FILE] [--out DIR] [--force] [--verify]

Writes train.bin, valid.bin and test.bin (raw bytes, so the vocabulary is 256 at most) and meta.json (sizes, SHA-256
of the whole and of each split, where it came from). Does nothing when they are already there.

``--newlines drop`` leaves the newlines out of each split, as the pipelines of Dai et al. 2019 and of the paper's
release do: 88 982 818 / 4 945 742 / 4 943 417 bytes of 204 values. Bits per byte of the two variants do not compare:
1.1 % of the bytes are newlines. It goes to a folder of its own, data/enwik8-no-newlines, and has a name of its own in
records.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.dataset import DataSet
from data.errors import SourceError
from data.fetch import LocalPath, Sdist, Url
from data.unpack import read_file

SPLITS = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}  # bytes
_MIRROR = "https://raw.githubusercontent.com/lucidrains/titans-pytorch/cc016ebca455a003749be4cab715acd88fea4d38"
_MAX_BYTES = 100_000_000


def cut(path: Path, folder: Path, splits: Mapping[str, int] = SPLITS, drop: bytes = b"") -> dict[str, dict[str, int]]:
    """Cut what `path` holds into SPLIT.bin of `splits` (split -> bytes) in `folder`, then leave the bytes `drop` out.

    Returns how many were left out of each split, if any are to be. Raises SourceError for another length.
    """
    total, done = sum(splits.values()), 0
    pieces = _read(path, splits)
    piece = b""
    dropped = dict.fromkeys(splits, 0)
    for split, missing in splits.items():
        with open(folder / f"{split}.bin", "wb") as file:
            while missing:
                piece = piece or next(pieces, b"")
                if not piece:
                    raise SourceError(f"{done} bytes, expected {total}")
                part, piece = piece[:missing], piece[missing:]
                dropped[split] += len(part) - file.write(part.translate(None, drop))
                missing -= len(part)
                done += len(part)
    for _ in pieces:  # nothing must be left, and the end of a damaged archive may be
        pass
    return {split: {"dropped": count} for split, count in dropped.items()} if drop else {}


def _read(path: Path, splits: Mapping[str, int]) -> Iterator[bytes]:
    """All bytes of a file, or of the splits in a folder that was prepared with every byte."""
    if path.is_dir():
        return chain.from_iterable(read_file(path / f"{split}.bin", size) for split, size in splits.items())
    return read_file(path, sum(splits.values()))


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

WITHOUT_NEWLINES = replace(
    ENWIK8,
    name="enwik8 without newlines",
    folder=ENWIK8.folder.with_name("enwik8-no-newlines"),
    sha256="22203e870e11681c6e0861904f5ef09132b09fbd97e6e2aeb1807ed88e597b81",
    sources=(LocalPath(ENWIK8.folder), *ENWIK8.sources),  # what is there need not be fetched again
    read=lambda path, folder: cut(path, folder, drop=b"\n"),
)

VARIANTS = {"keep": ENWIK8, "drop": WITHOUT_NEWLINES}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    note = f"drop: leave the newlines out, as the paper does; --out is data/{WITHOUT_NEWLINES.folder.name} then"
    parser.add_argument("--newlines", choices=VARIANTS, default="keep", help=note)
    options, others = parser.parse_known_args(arguments)
    return VARIANTS[options.newlines].main(others, [parser])


if __name__ == "__main__":
    sys.exit(main())
