"""What a training can be told that starts from another run, or has a number of epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from smoe.options import option
from smoe.schedule import Mode
from smoe.train.config import TrainConfig
from smoe.train.evaluate import read_run
from smoe.train.resume import Checkpoint, read_config

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
    schedule: Mode | None = "constant"

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if "steps" in given:
            if given.get("epochs") is not None:
                raise ValueError(f"epochs is {given['epochs']} and steps is {given['steps']}; give one of them")
            values["epochs"] = None  # a scale's epochs give way to a user's steps
        if given.get("run") is not None:
            recorded = read_config(given["run"])
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


def pretrained_record(pretrained: TrainConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What result.json says of the run that a training started from."""
    return {"scale": pretrained.scale, "seed": pretrained.seed, "step": checkpoint.step}
