"""Tasks of examples: read from JSON lines with a check, some held out, dealt to steps, passes and processes; FLOPs."""

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


def batch_of_step(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The indices of the examples of ``step``: each once an epoch, in an order that is drawn from (seed, epoch).

    What is less than a batch at the end of an epoch is left out of it.
    """
    epoch, within = divmod(step, count // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[within * batch_size : (within + 1) * batch_size]


def where_in_epochs(count: int, batch_size: int, step: int) -> str:
    """What ``step`` reads, for an error message."""
    epoch, within = divmod(step, count // batch_size)
    return f"epoch {epoch}, batch {within} of the data"


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
