"""What differs between trainings. The loop is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smoe.methods import PassOutput
from smoe.metrics import Metric
from smoe.train.config import TrainConfig
from smoe.train.processes import Processes


class Task(ABC):
    """One task: a model, what step s trains on, how a batch is run, how a split is measured.

    A subclass sets the attributes and writes the abstract methods; the others are for tasks that need them.
    ``transformer_xl/train.py`` is the first one, ``docs/extend.md`` has the steps.
    """

    name: ClassVar[str]  # in records, e.g. language_model
    metrics: ClassVar[tuple[Metric, ...]]  # of a split; the first one decides which checkpoint is best
    splits: ClassVar[tuple[str, ...]] = ("valid", "test")  # of the final sweep
    config_class: ClassVar[type[TrainConfig]]  # what a run can be told
    config: TrainConfig
    model: nn.Module  # all of it, on the CPU until the loop places it
    architecture: str  # in tables, e.g. transformer_xl
    title: str  # in the first line of the output
    blocks: Iterable[nn.Module]  # the layers, which FSDP shards one by one
    dataset: dict[str, Any]  # what a record says of the data: at least its name and sha256
    tokens_per_step: int  # of all processes
    step_shape: str  # the same in words

    def __init__(self, config: TrainConfig, rank: int, world_size: int) -> None:
        """Reads and checks the data, then builds the model, right after ``torch.manual_seed(config.seed)``.

        Raises ValueError for a user's mistake: nothing is written yet.
        """
        self.config, self.rank, self.world_size = config, rank, world_size
        # JSON that a checkpoint keeps to rebuild the model without the data, e.g. the vocabulary.
        self.facts: dict[str, Any] = {}
        self.record: dict[str, Any] = {}  # further fields of result.json

    # ---- every task -------------------------------------------------------------------------------------------------
    @abstractmethod
    def build_model(self) -> nn.Module:
        """A fresh model. It is called on the meta device as well, to count parameters and FLOPs."""

    @abstractmethod
    def batch(self, step: int) -> Any:
        """What this process trains on at ``step``: its share of the step's sequences, on the CPU. Pure in ``step``."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any, device: torch.device) -> PassOutput:
        """One forward pass of ``model``, which may wrap ``self.model``: the mean loss of the batch, and logits."""

    @abstractmethod
    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        """Measures ``split``: per forward pass the sums that :meth:`values` turns into metrics, a float64 vector.

        Its last element is the number of what is averaged over (tokens, examples). Each process reads its share, and
        all make as many passes, as experts on several processes need.
        """

    @abstractmethod
    def values(self, sums: list[float]) -> dict[str, float]:
        """Every metric by its key, from the sums of all passes of all processes."""

    @abstractmethod
    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        """``paper`` and ``true`` FLOPs of an evaluation pass, and of a ``training_step``; ``model`` is on meta.

        They must be a constant plus a multiple of the sum of k over the layers: a record counts them at k = 1 and k = N
        and takes what lies between from these two.
        """

    @classmethod
    def reported_split(cls) -> str:
        """The split that is reported: ``test``, or ``valid`` where there is none."""
        return "test" if "test" in cls.splits else "valid"

    # ---- tasks that need it -----------------------------------------------------------------------------------------
    def bare(self) -> nn.Module:
        """The part of ``self.model`` whose weights a checkpoint holds."""
        return self.model

    def carry(self, output: Any) -> None:  # noqa: B027 (may stay empty)
        """Keeps what the next step needs of this step's (first) forward pass, such as a memory."""

    def state(self) -> dict[str, Tensor]:
        """This process's rows of the tensors that a resumed run needs, rows first: what :meth:`carry` keeps."""
        return {}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:  # noqa: B027
        """The inverse of :meth:`state`, with the rows of all processes."""

    def where(self, step: int) -> str:
        """What ``step`` reads, for error messages."""
        return "the data"

    def files(self) -> list[Path]:
        """Files that are copied into the run folder, e.g. a tokenizer."""
        return []

    def result_files(self, processes: Processes) -> dict[str, str]:
        """Texts beside result.json, by file name. Every process calls it, after the sweep of the best weights."""
        return {}

    def notes(self) -> list[str]:
        """Further lines for the start of a training's output; asked once, by the main process."""
        return []


def equal_share(batch_size: int, rank: int, world_size: int) -> slice:
    """This process's rows of a batch. ValueError unless all have equally many: a mean of their means is the mean."""
    if batch_size % world_size:
        allowed = f"a multiple of the number of processes, {world_size}"
        raise ValueError(f"batch_size is {batch_size}; it must be {allowed}")
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
