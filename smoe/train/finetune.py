"""A training that starts from another run, or from some of its experts, or has a number of epochs."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from smoe.options import option
from smoe.schedule import Mode
from smoe.slim import VoteScore
from smoe.train.config import TrainConfig
from smoe.train.evaluate import read_run
from smoe.train.examples import Dealer
from smoe.train.resume import Checkpoint, read_config
from smoe.train.slimming import slim_task, slimmed_fields, sweep_up_to
from smoe.train.task import Task

Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """Fields beside those of a ``TrainConfig``: ``class MyConfig(FineTuned, RunConfig)``.

    All experts are activated throughout, unless ``k_min``, ``k_max`` and ``schedule`` say otherwise.
    """

    # What a pretrained run decides, since its weights fit no other model.
    of_the_run: ClassVar[tuple[str, ...]] = ("method", "num_layers", "d_model", "num_heads", "d_hidden", "num_experts")
    of_the_run += ("layers", "router", "score", "output_scale")

    run: str | None = option(None, "the pretrained run to start from; null: from scratch")
    epochs: float | None = option(None, "passes over the training examples; null: steps says how long", above=0)
    group_by_length: bool = option(False, "put examples of like length into one batch, so that less is padded")
    schedule: Mode | None = "constant"
    keep: int | None = option(
        None, "train with so many of the run's experts per layer, which the training data vote for; null: all of them"
    )
    vote_score: VoteScore | None = option(None, "what votes go by: count, weight or reap, as smoe.vote; null: count")
    vote_batches: int | None = option(None, "training batches that vote, at most an epoch; null: 64", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep", "vote_score", "vote_batches"):
            needs, needed = (self.run, "run") if name == "keep" else (self.keep, "keep")
            if getattr(self, name) is not None and needs is None:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which has no effect without {needed}")

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if "steps" in given:
            if given.get("epochs") is not None:
                raise ValueError(f"epochs is {given['epochs']} and steps is {given['steps']}; give one of them")
            values["epochs"] = None  # a scale's epochs give way to a user's steps
        if given.get("run") is not None:
            recorded = read_config(given["run"])
            if given.get("keep") is not None:
                recorded |= slimmed_fields(recorded, given["keep"], given["run"])
                values["sweep"] = sweep_up_to(given["keep"], cls.sweep)
            values |= {name: recorded[name] for name in cls.of_the_run if name in recorded}
        return values

    def k_schedule(self) -> tuple[int, int, str]:
        k_max = self.num_experts if self.k_max is None else self.k_max
        return k_max if self.k_min is None else self.k_min, k_max, self.schedule or "constant"

    def resolved(self) -> FineTuned:
        """With the steps that ``epochs`` come to; an epoch leaves out what is less than a batch at its end."""
        config = super().resolved()
        if self.epochs is None:
            return config
        steps = round(self.epochs * (self.training_examples() // self.batch_size))
        return dataclasses.replace(config, steps=max(steps, 1))

    def training_examples(self) -> int:
        """How many examples an epoch has. Raises ValueError for data that can't be used."""
        raise NotImplementedError

    def read_pretrained(self, config_class: type[Config], what: str) -> tuple[Config, Checkpoint]:
        """The configuration and the best checkpoint of ``run``, as :func:`smoe.train.evaluate.read_run`.

        Raises ValueError for a size or a method that the run does not have.
        """
        pretrained, checkpoint = read_run(self.run, config_class, what)
        for name in self.of_the_run:
            asked, needed = getattr(self, name), getattr(pretrained, name)
            if asked != needed:
                raise ValueError(f"{name} is {asked!r}, but the weights of {self.run} need {needed!r}")
        return pretrained, checkpoint


class FineTuneTask(Task):
    """A task with a pretrained encoder, ``self.model.encoder``, and examples that are padded to one length."""

    config: FineTuned
    dealer: Dealer  # of the training examples, see deal

    def where(self, step: int) -> str:
        return self.dealer.where(step)

    @abstractmethod
    def load_run(self) -> dict[str, Any]:
        """Gives the encoder the weights of ``config.run``; returns what a record says of that run."""

    @abstractmethod
    def token_mask(self, batch: Any) -> Tensor:
        """Which of the tokens that the encoder reads are no padding, nonzero there."""

    @abstractmethod
    def padded(self, example: Any) -> int:
        """The tokens of an example, or of its longest sequence: what a batch is padded to."""

    def deal(self, examples: Sequence[Any]) -> Dealer:
        """Which of the training examples each step has."""
        c = self.config
        lengths = [self.padded(example) for example in examples] if c.group_by_length else None
        return Dealer(len(examples), c.batch_size, c.seed, lengths)

    def load_pretrained(self) -> None:
        """Starts the encoder from ``config.run``, if there is one: from all of its experts or those that it keeps."""
        c = self.config
        if c.run is None:
            return
        if c.keep is None:
            self.record["pretrained"] = self.load_run()
            return
        recorded = read_config(c.run)
        for name, value in slimmed_fields(recorded, c.keep, c.run).items():
            asked = getattr(c, name)
            if name in c.of_the_run and asked != value:
                raise ValueError(f"{name} is {asked!r}; with {c.keep} of the experts of {c.run} it must be {value!r}")
        # The same task with all experts, whose batches are those of this one.
        whole_fields = {name: recorded[name] for name in c.of_the_run if name in recorded}
        whole = type(self)(dataclasses.replace(c, **whole_fields, keep=None, vote_score=None, vote_batches=None), 0, 1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        whole.model.to(device)
        epoch = c.training_examples() // c.batch_size
        voted = {"score": c.vote_score or "count", "batches": min(c.vote_batches or 64, epoch)}
        torch.manual_seed(c.seed)  # of what a router draws at random (THOR)
        slim_task(whole, c.keep, **voted, device=device, token_mask=whole.token_mask)
        self.model.encoder.load_state_dict(whole.model.encoder.state_dict())
        self.record["pretrained"] = (
            {"num_experts": recorded["num_experts"]} | whole.record["pretrained"] | {"vote": voted}
        )


def pretrained_record(pretrained: TrainConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What result.json says of the run that a training started from; of experts also (k_min, k_max, mode).

    Of a run with fewer experts than it was trained with: ``num_experts`` and ``k_schedule`` of its training.
    """
    record = {"scale": pretrained.scale, "seed": pretrained.seed, "step": checkpoint.step}
    if not pretrained.get_method().routed:
        return record
    return record | checkpoint.state.get("slimmed_from", {"k_schedule": list(pretrained.k_schedule())})
