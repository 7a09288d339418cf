"""Bytes of a prepared data set, and the order in which a Transformer-XL sees them.

A split is cut into `batch_size` contiguous rows of equal length that are read side by side, segment after segment, so
that the memory a row carries into its next segment is that row's own past (Dai et al. 2019, Section 3.2). Everything is
a slice of a memory-mapped file: nothing is read before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smoe.mapped import MappedFile
from smoe.prepared import read_prepared
from smoe.train.task import equal_share


def load_data(data_dir: str | Path) -> tuple[dict[str, np.memmap], dict[str, str]]:
    """The raw bytes of train, valid and test as read-only memory maps, (bytes,) uint8; and what a record says of them:
    name and SHA-256 of the whole data set (all splits in order).

    Raises ValueError, in one line, when the folder was not prepared or a file holds other bytes than it was.
    """
    folder = Path(data_dir)
    newlines = " --newlines drop" if "no-newlines" in folder.name else ""
    advice = f"run: python data/enwik8/prepare.py{newlines} --out {folder}"
    meta = read_prepared(folder, advice, ("train", "valid", "test"), {"sha256": str})
    parts = meta["splits"].items()
    data = {split: MappedFile(folder / part["file"], np.uint8) for split, part in parts}
    return data, {"name": meta.get("dataset", "enwik8"), "sha256": meta["sha256"]}


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
