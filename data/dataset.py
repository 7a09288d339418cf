"""A published data set: fetched, checked, split, and recorded in meta.json.

Most are the same bytes for everybody. Of one that a sample may stand for (HotpotQA), the record has the hash.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DownloadError, SourceError, printable, run
from data.fetch import LocalPath, Source, first_that_works
from data.folder import RECORD, move_in, scratch, sha256_of


@dataclass(frozen=True)
class DataSet:
    """What the commands of such data sets differ in.

    name: what results call it.
    folder: where it goes by default.
    files: the file of each split, in order.
    sha256: of these files, one after the other; None: whatever a source holds.
    sources: where to get it, the best first.
    read: `read(fetched, folder)` writes the files to `folder`, and returns what else the record says of each split,
        or raises SourceError.
    local: what may be given with --source.
    is_wanted: whether data that is there, with these `splits` in its record, is what is asked for.
    """

    name: str
    folder: Path
    files: Mapping[str, str]
    sha256: str | None
    sources: Sequence[Source]
    read: Callable[[Path, Path], Mapping[str, Mapping[str, Any]]]
    local: str
    is_wanted: Callable[[Mapping[str, Any]], bool] = lambda splits: True

    def is_prepared(self, out: Path, contents: bool = False, source: Path | None = None) -> bool:
        """Whether `out` holds the data: by its record and the files' sizes, or with `contents` by every byte's hash.

        With a `source`, data that may be anything must be from there.
        """
        try:
            meta = json.loads((out / RECORD).read_text())
            parts = meta["splits"]
            sha256 = meta["sha256"] if self.sha256 is None else self.sha256
            if meta["sha256"] != sha256 or {split: part["file"] for split, part in parts.items()} != self.files:
                return False
            if self.sha256 is None and source is not None and meta["source"] != LocalPath(source).name:
                return False
            if not self.is_wanted(parts):
                return False
            if any((out / part["file"]).stat().st_size != part["bytes"] for part in parts.values()):
                return False
            return not contents or (
                all(sha256_of(out / part["file"]) == part["sha256"] for part in parts.values())
                and self._sha256_in(out) == sha256
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False

    def prepare(self, out: Path, sources: Sequence[Source]) -> dict[str, Any]:
        """Fetch from the first source that holds the right bytes; write files and record to `out`; return the record.

        Whatever stops it, `out` then holds the old files or the new ones, and meta.json only if all splits are whole.
        Raises DownloadError when no source will do, OSError when `out` can't be written.
        """
        with scratch(out) as partial:
            splits, source = first_that_works(sources, lambda fetched: self._accept(fetched, partial), partial)
            meta = {
                "dataset": self.name,
                "bytes": sum(part["bytes"] for part in splits.values()),
                "sha256": self._sha256_in(partial),
                "source": source,
                "splits": splits,
            }
            (partial / RECORD).write_text(json.dumps(meta, indent=2) + "\n")
            move_in(partial, out, list(self.files.values()), same=self.is_prepared(out))
        return meta

    def _accept(self, fetched: Path, partial: Path) -> dict[str, dict[str, Any]]:
        """Write the files to `partial` and return what the record says of each. Raises SourceError for wrong bytes."""
        facts = self.read(fetched, partial)
        if self.sha256 is not None and (found := self._sha256_in(partial)) != self.sha256:
            raise SourceError(f"SHA-256 is {found}, expected {self.sha256}")
        return {
            split: {
                "file": file,
                "bytes": (partial / file).stat().st_size,
                "sha256": sha256_of(partial / file),
                **facts.get(split, {}),
            }
            for split, file in self.files.items()
        }

    def _sha256_in(self, folder: Path) -> str:
        return sha256_of(*(folder / file for file in self.files.values()))

    def main(self, arguments: Sequence[str] | None = None, parents: Sequence[argparse.ArgumentParser] = ()) -> int:
        """The command line; returns the exit status, see `data.errors.run`: 2 is for a --source that won't do.

        `parents`: parsers of further options that the caller has read, for --help.
        """
        parser = argparse.ArgumentParser(description=f"Fetch, check and split {self.name}.", parents=list(parents))
        parser.add_argument("--source", type=Path, help=f"a local copy instead of a download: {self.local}")
        parser.add_argument("--out", type=Path, default=self.folder, help="default: %(default)s")
        parser.add_argument("--force", action="store_true", help="prepare again even if it is all there")
        parser.add_argument("--verify", action="store_true", help="check every byte of what is there, not sizes alone")
        options = parser.parse_args(arguments)
        if not options.force and self.is_prepared(options.out, contents=options.verify, source=options.source):
            return 0
        return run(self.name, options.out, lambda: self._prepare_from(options.source, options.out))

    def _prepare_from(self, source: Path | None, out: Path) -> None:
        print(f"{self.name}: {f'reading {printable(source)}' if source else 'downloading'}", file=sys.stderr)
        try:
            meta = self.prepare(out, [LocalPath(source)] if source else self.sources)
        except DownloadError as error:
            if source:
                raise ValueError(f"source: {error}; it must be {self.local}") from error
            raise DownloadError(f"{error}; or give a copy with --source: {self.local}") from error
        print(f"{self.name}: {meta['bytes']} bytes in {out}, from {meta['source']}", file=sys.stderr)
