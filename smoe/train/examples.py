"""Tasks of examples: read from JSON lines with a check, some held out, dealt to steps and passes; FLOPs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from smoe.flops import count, count_step
from smoe.json_files import parse_json
from smoe.prepared import read_prepared
from smoe.train.config import TrainConfig

Example = TypeVar("Example")


def read_examples(
    folder: Path,
    parts: Mapping[str, str],
    read: Callable[[Any], Example],
    advice: str,
    facts: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, list[Example]]]:
    """What a record says of a prepared folder, and the examples of its files, checked against meta.json.

    Args:
        parts: split of the task -> name of the split in meta.json.
        read: makes an example of a line; raises ValueError, KeyError or TypeError for one that can't be used.
        advice: how to prepare the folder, for messages.
        facts: what meta.json says of each part that the record is to have too, by split of the task.

    Raises ValueError, in one line, when the folder is not prepared, damaged, or has no examples in a part.
    """
    known: dict[str, dict[str, Any]] = {}

    def note(meta: dict[str, Any]) -> None:
        for fact in facts:
            known[fact] = {split: meta["splits"][name][fact] for split, name in parts.items() if name in meta["splits"]}

    meta = read_prepared(folder, advice, parts.values(), {"dataset": str, "sha256": str}, note)
    data = {split: _read_part(folder / meta["splits"][name]["file"], read, advice) for split, name in parts.items()}
    return {"name": meta["dataset"], "sha256": meta["sha256"], **known}, data


def _read_part(file: Path, read: Callable[[Any], Example], advice: str) -> list[Example]:
    try:
        examples = [read(parse_json(line)) for line in file.read_bytes().splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data: {file} is damaged ({error}); {advice} --force") from None
    if not examples:
        raise ValueError(f"data: {file} has no examples; {advice} --force")
    return examples


def hold_out(
    examples: Sequence[Example], share: float, key: Callable[[Example], str]
) -> tuple[list[Example], list[Example]]:
    """Splits examples into (the rest, about ``share`` of them).

    An example's key alone decides, by its hash, so that equal ones stay together, whatever the order.
    Raises ValueError when nothing is left on one of the sides.
    """
    rest, held = [], []
    for example in examples:
        number = int.from_bytes(hashlib.sha256(key(example).encode()).digest()[:8], "big")
        (held if number < share * 2**64 else rest).append(example)
    for side, what in ((rest, "to train on"), (held, "to validate on")):
        if not side:
            raise ValueError(f"valid_share is {share}; of {len(examples)} examples it leaves none {what}")
    return rest, held


class Dealer:
    """Which examples each step trains on: each once an epoch, in an order that is drawn from (seed, epoch).

    What is less than a batch at the end of an epoch is left out of it.

    Args:
        lengths: of each example; if given, examples of like length share a batch, so that less is padded: of every 50
            batches in a row the examples are sorted by length, and the batches of an epoch come in a drawn order.
    """

    _TOGETHER = 50  # batches, as Hugging Face's Trainer sorts them

    def __init__(self, count: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.steps, self.batch_size, self.seed = count // batch_size, batch_size, seed
        self.count, self.lengths = count, None if lengths is None else np.asarray(lengths)
        self._order: tuple[int, np.ndarray] | None = None  # the epoch that was asked for last, its batches

    def batch(self, step: int) -> np.ndarray:
        """The indices of the examples of ``step``."""
        epoch, within = divmod(step, self.steps)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._draw(epoch)
        return self._order[1][within]

    def where(self, step: int) -> str:
        """What ``step`` reads, for an error message."""
        epoch, within = divmod(step, self.steps)
        return f"epoch {epoch}, batch {within} of the data"

    def _draw(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.count)[: self.steps * self.batch_size]
        if self.lengths is None:
            return order.reshape(self.steps, self.batch_size)
        size = self._TOGETHER * self.batch_size
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        return order.reshape(self.steps, self.batch_size)[generator.permutation(self.steps)]


def evaluation_slices(count: int, batch_size: int, rank: int, ranks: int) -> Iterator[range]:
    """The indices of every evaluation pass of a process. All make as many; one that has run out gets empty ones."""
    mine = range(rank * count // ranks, (rank + 1) * count // ranks)
    for start in range(0, -(-count // ranks), batch_size):
        yield mine[start : start + batch_size]


def count_flops(
    config: TrainConfig, model: nn.Module, one_pass: Any, batch: Any, k: int | list[int] | None
) -> dict[str, int]:
    """What ``Task.flops`` returns, from inputs of an evaluation pass and of a step, of which shapes alone matter."""
    weights = {"balance_weight": config.balance_weight, "consistency_weight": config.consistency_weight}
    counted, step = count(model, one_pass, k), count_step(model, config.method, batch, k, **weights)
    return {"paper": counted.paper_linear, "true": counted.true, "training_step": step}
