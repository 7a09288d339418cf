"""enwik8: the first 100 000 000 bytes of an English Wikipedia dump of 2006, split 90M / 5M / 5M for language models.

    python data/enwik8/prepare.py [--source FILE] [--out DIR] [--force] [--verify]

Writes train.bin, valid.bin and test.bin (raw bytes, so the vocabulary is 256 at most) and meta.json (sizes, SHA-256
of the whole and of each split, where it came from). Does nothing when they are already there.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY) not in sys.path:  # so that it runs before the project is installed
    sys.path.append(str(REPOSITORY))

if TYPE_CHECKING:
    from smoe.run.download import Source

SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
SPLITS = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}


def default_sources() -> list["Source"]:
    """The home page first, then mirrors; the last one needs the Python package index only."""
    from smoe.run.download import Sdist, Url

    mirror = "https://raw.githubusercontent.com/lucidrains/titans-pytorch"
    return [
        Url("http://mattmahoney.net/dc/enwik8.zip"),
        Url(f"{mirror}/cc016ebca455a003749be4cab715acd88fea4d38/data/enwik8.gz"),
        Sdist("titans-pytorch", "0.5.1", "data/enwik8.gz", backend="hatchling.build"),
    ]


def is_prepared(out: Path, splits: Mapping[str, int] = SPLITS, sha256: str = SHA256, contents: bool = False) -> bool:
    """Whether `out` holds the data: by its record and the files' sizes, or with `contents` by every byte's hash."""
    try:
        meta = json.loads((out / "meta.json").read_text())
        if meta["sha256"] != sha256 or {name: part["bytes"] for name, part in meta["splits"].items()} != dict(splits):
            return False
        if any((out / f"{name}.bin").stat().st_size != size for name, size in splits.items()):
            return False
        if contents:
            from smoe.run.download import sha256_file

            return all(sha256_file(out / f"{name}.bin") == part["sha256"] for name, part in meta["splits"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def prepare(
    out: Path,
    sources: Sequence["Source"],
    splits: Mapping[str, int] = SPLITS,
    sha256: str = SHA256,
) -> dict[str, Any]:
    """Fetch from the first source that holds the right bytes, write the splits and the record to `out`; return the
    record (what meta.json holds).

    Whatever stops it, `out` then holds the old files or the new ones, and meta.json only if all splits are whole.
    Raises DownloadError when no source will do, OSError when `out` can't be written.
    """
    from smoe.run.download import first_that_works, read_chunks, scratch, write_splits

    files = {f"{name}.bin": size for name, size in splits.items()}
    with scratch(out) as partial:
        hashes, source = first_that_works(
            sources, lambda path: write_splits(read_chunks(path), partial, files, sha256), partial
        )
        meta = {
            "dataset": "enwik8",
            "bytes": sum(splits.values()),
            "sha256": sha256,
            "source": source,
            "splits": {
                name: {"file": f"{name}.bin", "bytes": size, "sha256": hashes[f"{name}.bin"]}
                for name, size in splits.items()
            },
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        # The record of anything else goes first, and ours comes last: while it is there, it is true. When another
        # process has just written the same data, its record stays, for somebody may be reading already.
        if not is_prepared(out, splits, sha256):
            (out / "meta.json").unlink(missing_ok=True)
        for file in (*files, "meta.json"):
            os.replace(partial / file, out / file)
    return meta


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a bad `--source`, 1 when nothing can be fetched or written."""
    parser = argparse.ArgumentParser(description="Fetch, check and split enwik8.")
    parser.add_argument("--source", type=Path, help="a local copy instead of a download: .zip, .gz, .xz or raw")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="prepare again even if it is all there")
    parser.add_argument("--verify", action="store_true", help="check every byte of what is there, not just the sizes")
    options = parser.parse_args(arguments)
    out: Path = options.out
    if not options.force and is_prepared(out, contents=options.verify):
        return 0

    from smoe.run.download import DownloadError, LocalFile

    # SIGTERM as an exception, so that what is half-written goes.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print(f"enwik8: {'reading ' + str(options.source) if options.source else 'downloading'}", file=sys.stderr)
        meta = prepare(out, [LocalFile(options.source)] if options.source else default_sources())
    except DownloadError as error:
        advice = "give the 100 000 000 bytes" if options.source else "get enwik8.zip on another machine and give it"
        print(f"error: enwik8: {error}; {advice} with --source FILE (.zip, .gz, .xz or raw)", file=sys.stderr)
        return 2 if options.source else 1  # bad input, or a machine without a way out
    except OSError as error:
        print(f"error: enwik8: can't write to {out}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("enwik8: interrupted, nothing written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"enwik8: {meta['bytes']} bytes in {out}, from {meta['source']}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
