"""Tasks whose examples have one right answer out of several: what is chosen, kept, and right."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smoe.metrics import Metric
from smoe.train.examples import evaluation_slices
from smoe.train.finetune import FineTuneTask
from smoe.train.predictions import Predictions


class Choosing(FineTuneTask):
    """Chooses the largest of a model's ``logits (B, answers)``; ``data`` has the examples of train and every split."""

    metrics = (Metric("accuracy", "Accuracy", "share of n examples", "higher"),)
    # What predictions call each answer.
    names: ClassVar[Sequence[str]]

    data: dict[str, Sequence[Any]]
    predictions: Predictions

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the model is called with for these examples."""

    @abstractmethod
    def answer(self, example: Any) -> int:
        """The right one, an index of ``names``."""

    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        examples, kept = self.data[split], self.predictions.at(model)
        # By length, so that less is padded; and each process has its part of the long ones.
        by_length = sorted(range(len(examples)), key=lambda i: self.padded(examples[i]))
        by_length = [i for rank in range(self.world_size) for i in by_length[rank :: self.world_size]]
        for places in evaluation_slices(len(examples), self.config.eval_batch_size, self.rank, self.world_size):
            mine = [by_length[place] for place in places]
            # Where other processes have one more pass, an example that does not count.
            batch = self.collate([examples[i] for i in mine] or examples[:1])
            chosen = self.forward(model, batch, device).logits.argmax(-1).tolist()
            right = [choice == self.answer(examples[i]) for i, choice in zip(mine, chosen, strict=False)]
            kept |= {
                str(i): (self.names[choice], is_right) for i, choice, is_right in zip(mine, chosen, right, strict=False)
            }
            yield torch.tensor([sum(right), len(mine)], dtype=torch.float64, device=device)

    def values(self, sums: list[float]) -> dict[str, float]:
        right, examples = sums
        return {"accuracy": right / examples}
