"""Bytes of a prepared data set, and the order in which a Transformer-XL sees them.

A split is cut into `batch_size` contiguous rows of equal length that are read side by side, segment after segment, so
that the memory a row carries into its next segment is that row's own past (Dai et al. 2019, Section 3.2). Everything is
a slice of a memory-mapped file: nothing is read before it is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smoe.train.task import equal_share


def load_split(data_dir: str | Path, split: str) -> np.memmap:
    """The raw bytes of `split` ("train", "valid" or "test") as a read-only memory map, (bytes,) uint8.

    Raises ValueError, in one line, when the folder was not prepared, has no such split, or its file was cut short.
    """
    parts = _meta(data_dir)["splits"]
    if split not in parts:
        raise ValueError(f"split: {split!r} is not in {data_dir}, which has {', '.join(sorted(parts))}")
    path = Path(data_dir) / parts[split]["file"]
    if not path.is_file():
        raise ValueError(f"data: {path} is missing; {_advice(data_dir)}")
    size, expected = path.stat().st_size, parts[split]["bytes"]
    if size != expected:
        raise ValueError(f"data: {path} has {size} bytes, but meta.json says {expected}; {_advice(data_dir)}")
    return np.memmap(path, dtype=np.uint8, mode="r")


def dataset_record(data_dir: str | Path) -> dict[str, str]:
    """Name and SHA-256 of the whole data set (all splits in order), as its meta.json has them.

    The bytes of each split are checked first (a fraction of a second), so that what a result says it was trained on
    is what it was trained on. Raises ValueError in one line when a file is missing or holds other bytes.
    """
    meta = _meta(data_dir)
    for split, part in meta["splits"].items():
        if hashlib.sha256(load_split(data_dir, split)).hexdigest() != part["sha256"]:
            path = Path(data_dir) / part["file"]
            raise ValueError(f"data: {path} has not the SHA-256 of meta.json; {_advice(data_dir, force=True)}")
    return {"name": meta.get("dataset", "enwik8"), "sha256": meta["sha256"]}


class SegmentStream:
    """Training segments as a pure function of the step, so that a resumed run goes on where it stopped.

    data: (n,) uint8. It is cut into `batch_size` rows of n // batch_size tokens; a row has
    (row length - 1) // tgt_len segments an epoch. What is left over (less than a segment a row) is never seen, so that
    every step has the same shape. Of `world_size` processes, `rank` reads its contiguous share of the rows:
    together they read what one process would.
    """

    def __init__(self, data: np.ndarray, batch_size: int, tgt_len: int, rank: int = 0, world_size: int = 1) -> None:
        assert batch_size > 0 and tgt_len > 0 and 0 <= rank < world_size
        row_length = len(data) // batch_size
        self.segments_per_epoch = (row_length - 1) // tgt_len
        if self.segments_per_epoch < 1:
            raise ValueError(
                f"batch_size x tgt_len: {batch_size} x {tgt_len} is too much for {len(data)} bytes; "
                f"a row holds {row_length}, and tgt_len must be at most {max(row_length - 1, 0)}"
            )
        self.tgt_len = tgt_len
        self.share = equal_share(batch_size, rank, world_size)  # of the rows
        self._rows = _rows(data, batch_size, rank, world_size)

    def segment(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """What to train on at `step` >= 0: inputs (rows, tgt_len) and targets (rows, tgt_len), int64, the targets one
        token ahead; and whether this starts an epoch, when the memory of the last one must be dropped."""
        if step < 0:
            raise ValueError(f"step: {step}, it must be at least 0")
        within = step % self.segments_per_epoch
        start = within * self.tgt_len
        return *_segment(self._rows, start, start + self.tgt_len), within == 0


def evaluation_segments(
    data: np.ndarray,
    batch_size: int,
    tgt_len: int,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `data` (n,) uint8 in order: inputs and targets, (rows, length) int64, length <= tgt_len.

    Each of the n // batch_size tokens of each row but its first (which nothing precedes) is a target once, so the last
    segment may be shorter. The rows are dealt to the ranks as evenly as they can be, and are the same whatever
    `world_size` is. A rank without rows reads the first one, with targets of -100 that don't count: every rank makes as
    many passes, as experts spread over ranks need. Less than `batch_size` bytes at the end are left out.

    `max_tokens` bounds the number of targets over all rows and ranks, for a quick look: each row is then read only up
    to its share.
    """
    assert batch_size > 0 and tgt_len > 0 and 0 <= rank < world_size
    last = len(data) // batch_size - 1
    if last < 1:
        raise ValueError(
            f"batch_size: {batch_size} rows are too many for {len(data)} bytes; it must be at most {len(data) // 2}"
        )
    if max_tokens is not None:
        if max_tokens < batch_size:
            raise ValueError(f"eval_tokens is {max_tokens}; it must be at least eval_batch_size = {batch_size}")
        last = min(last, max_tokens // batch_size)
    rows = _rows(data, batch_size, rank, world_size)
    counts = len(rows) > 0
    if not counts:
        rows = _rows(data, batch_size, 0, batch_size)

    def segment(start: int) -> tuple[Tensor, Tensor]:
        inputs, targets = _segment(rows, start, min(start + tgt_len, last))
        return inputs, targets if counts else torch.full_like(targets, -100)

    # A generator of its own, so that a mistake above is reported by the call, not by the first step of the loop.
    return (segment(start) for start in range(0, last, tgt_len))


def _rows(data: np.ndarray, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """This rank's rows, (rows, row length), a view."""
    row_length = len(data) // batch_size
    rows = data[: batch_size * row_length].reshape(batch_size, row_length)
    return rows[rank * batch_size // world_size : (rank + 1) * batch_size // world_size]


def _segment(rows: np.ndarray, start: int, stop: int) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(rows[:, start : stop + 1].astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _meta(data_dir: str | Path) -> dict[str, Any]:
    path = Path(data_dir) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        types = {"file": str, "bytes": int, "sha256": str}
        if all(isinstance(part[name], types[name]) for part in meta["splits"].values() for name in types):
            meta["sha256"] = str(meta["sha256"])
            return meta
    except OSError:
        raise ValueError(f"data: no prepared data set in {data_dir}; {_advice(data_dir)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # damaged: said below, as for one that lacks fields
    raise ValueError(f"data: {path} is damaged; {_advice(data_dir, force=True)}")


def _advice(data_dir: str | Path, force: bool = False) -> str:
    newlines = " --newlines drop" if "no-newlines" in Path(data_dir).name else ""
    return f"run: python data/enwik8/prepare.py{newlines} --out {data_dir}{' --force' if force else ''}"
