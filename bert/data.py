"""Prepared blocks of tokens as training batches and evaluation sequences, masked for prediction.

Everything is a pure function of its arguments: what step s trains on depends on (seed, s) alone, and how an evaluation
sequence is masked on its place in the split alone, so every method and every k answers the same questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smoe.mapped import MappedFile
from smoe.prepared import check_file, read_prepared
from smoe.train.task import equal_share

# What meta.json has, beside the splits.
_FIELDS = {name: str for name in ("dataset", "model", "dtype", "sha256")}
_FIELDS |= {"block_length": int, "vocab_size": int, "special_ids": dict, "duplicates_left_out": int}
_FIELDS |= {"note": (str, type(None)), "origin": (list, dict), "tokenizer": dict}
_DTYPES = ("uint16", "int32")

_ORDER, _MASK, _EVALUATION = 0, 1, 2  # what a generator is for: no two uses share their numbers


class MaskedBatch(NamedTuple):
    """`input_ids (B, T)`; `positions (B, M)` of the tokens to predict, ascending; `targets (B, M)` what they were, -100
    where a sequence has fewer. All int64."""

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a model and its masks must know; `never_masked` are start, end and padding."""

    size: int
    pad: int
    mask: int
    start: int
    end: int
    unknown: int

    @property
    def never_masked(self) -> tuple[int, ...]:
        return (self.start, self.end, self.pad)


class Blocks:
    """A folder that data/bookcorpus/prepare.py filled, checked.

    Raises ValueError, in one line, when it isn't one, is for another model, or a file is not as recorded; the line
    says how to prepare it for `scale`.
    """

    def __init__(self, folder: str | Path, model: str, scale: str = "auto") -> None:
        self.folder = Path(folder)
        self._advice = f"run: python data/bookcorpus/prepare.py --model {model} --scale {scale} --out {folder}"
        self.meta = read_prepared(self.folder, self._advice, ("train", "valid", "test"), _FIELDS, _check)
        if self.meta["model"] != model:
            raise ValueError(f"data: {folder} holds tokens for {self.meta['model']}; {self._advice}")
        self.block_length: int = self.meta["block_length"]
        self.vocabulary = Vocabulary(self.meta["vocab_size"], **self.meta["special_ids"])
        check_file(self.folder / "tokenizer.json", self.meta["tokenizer"]["sha256"], self._advice)

    @property
    def record(self) -> dict[str, Any]:
        """What result.json says of the data set."""
        names = ("sha256", "vocab_size", "block_length", "duplicates_left_out", "note", "origin")
        record = {"name": self.meta["dataset"]} | {name: self.meta[name] for name in names}
        record["splits"] = {name: part["sha256"] for name, part in self.meta["splits"].items()}
        return record | {"tokenizer": self.meta["tokenizer"]}

    def sequences(self, split: str, seq_len: int) -> np.ndarray:
        """The split as (sequences, seq_len), a read-only view of the file: each block cut into equal parts.

        Where `seq_len` is less than the block's length, only the first part of a block starts with [CLS].
        """
        if self.block_length % seq_len:
            raise ValueError(
                f"seq_len is {seq_len}; it must divide the data's blocks of {self.block_length} tokens; "
                f"--block_length {seq_len} of data/bookcorpus/prepare.py makes blocks that fit"
            )
        path = self.folder / self.meta["splits"][split]["file"]
        return MappedFile(path, self.meta["dtype"]).reshape(-1, seq_len)


class TrainingBatches:
    """What each step trains on: every sequence once an epoch, in an order drawn anew for each.

    data: (n, T). A step has `batch_size` sequences over all processes; `rank` of `world_size` gets its contiguous part,
    with the very masks that one process alone would draw. Each sequence has the same number of tokens to predict, so
    that the mean over processes is the mean over tokens. What is left over (less than a step) waits for the next epoch.
    """

    def __init__(
        self,
        data: np.ndarray,
        vocabulary: Vocabulary,
        batch_size: int,
        mask_share: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(data) < batch_size:
            raise ValueError(f"batch_size: {batch_size} is more than the {len(data)} sequences there are to train on")
        self.data, self.vocabulary, self.batch_size = data, vocabulary, batch_size
        self.mask_share, self.seed = mask_share, seed
        self.share = equal_share(batch_size, rank, world_size)
        self.steps_per_epoch = len(data) // batch_size
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> MaskedBatch:
        """This process's share of step `step` >= 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _generator(_ORDER, self.seed, epoch).permutation(len(self.data)))
        chosen = self._order[1][within * self.batch_size : (within + 1) * self.batch_size]
        tokens = self.data[chosen].astype(np.int64)
        masked = mask(tokens, self.vocabulary, self.mask_share, _generator(_MASK, self.seed, step))
        return MaskedBatch(*(torch.from_numpy(part[self.share]) for part in masked))

    def where(self, step: int) -> str:
        """What `step` reads, for an error message."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return f"epoch {epoch}, batch {within} of the data"


def evaluation_batches(
    data: np.ndarray,
    vocabulary: Vocabulary,
    batch_size: int,
    mask_share: float,
    rank: int = 0,
    world_size: int = 1,
    max_sequences: int | None = None,
) -> Iterator[MaskedBatch]:
    """One pass over `data` (n, T), or over `max_sequences` spread evenly over it, masked the same way every time.

    The sequences are dealt to the ranks as evenly as they can be; neither ranks nor batch size change the masks. Every
    rank gets as many batches, as experts spread over ranks need: one that has run out of sequences repeats one, with
    targets of -100 that don't count.
    """
    count = len(data) if max_sequences is None else min(max_sequences, len(data))
    chosen = np.arange(count) * len(data) // count
    mine = chosen[rank * count // world_size : (rank + 1) * count // world_size]
    for start in range(0, -(-count // world_size), batch_size):
        rows = mine[start : start + batch_size]
        counts = len(rows) > 0
        if not counts:
            rows = chosen[:1]
        tokens = data[rows].astype(np.int64)
        parts = [
            mask(tokens[i : i + 1], vocabulary, mask_share, _generator(_EVALUATION, 0, int(row)))
            for i, row in enumerate(rows)
        ]
        batch = MaskedBatch(*(torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)))
        yield batch if counts else batch._replace(targets=torch.full_like(batch.targets, -100))


def mask(
    tokens: np.ndarray, vocabulary: Vocabulary, share: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BERT's masking (Devlin et al. 2019, 3.1) of `tokens` (B, T) int64: inputs (B, T), positions and targets (B, M).

    M = round(share x T) tokens of each sequence are to be predicted; of them 80 % become the mask, 10 % a random token
    and 10 % stay. Start, end and padding are never chosen; where too few others are left, targets say -100.
    """
    batch, length = tokens.shape
    count = max(round(share * length), 1)
    keys = generator.random(tokens.shape)
    keys[np.isin(tokens, vocabulary.never_masked)] = 2.0
    positions = np.sort(np.argpartition(keys, count - 1, axis=1)[:, :count], axis=1)
    chosen = np.take_along_axis(tokens, positions, axis=1)
    valid = np.take_along_axis(keys, positions, axis=1) < 2
    fate = generator.random(positions.shape)
    random_tokens = generator.integers(0, vocabulary.size, size=positions.shape)
    shown = np.where(fate < 0.8, vocabulary.mask, np.where(fate < 0.9, random_tokens, chosen))
    inputs = tokens.copy()
    np.put_along_axis(inputs, positions, np.where(valid, shown, chosen), axis=1)
    return inputs, positions, np.where(valid, chosen, -100)


def _generator(purpose: int, seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, seed, index])))


def _check(meta: dict[str, Any]) -> None:
    if meta["dtype"] not in _DTYPES:
        raise ValueError(f"dtype is {meta['dtype']!r}, not one of {', '.join(_DTYPES)}")
    for name, least in (("block_length", 3), ("vocab_size", 1)):
        if meta[name] < least:
            raise ValueError(f"{name} is {meta[name]}")
    meta["tokenizer"]["sha256"]
    special = Vocabulary(meta["vocab_size"], **meta["special_ids"])
    for name, value in vars(special).items():
        if name != "size" and (type(value) is not int or not 0 <= value < special.size):
            raise ValueError(f"the id of {name} is {value!r}")
