"""Distils a fine-tuned Transformer-XL into a dense one as wide as one of its experts (SST-2, Table 3).

    python -m transformer_xl.distil --teacher RUN --run_dir runs/student

RUN is a run of ``transformer_xl.classify``. The student learns from the labels and from what the teacher, with all its
experts activated, says of the same sentences (Hinton et al. 2015):

    (1 - soft_weight) * cross entropy with the labels + soft_weight * t^2 * KL(teacher at t || student at t)

where "at t" is the softmax of the logits divided by the temperature t. The paper says neither weight nor temperature.
The student starts from random weights, or from a dense pretrained run of its size (``--run``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe.control import set_top_k
from smoe.errors import run_main
from smoe.options import option, required
from smoe.train.command import run_training
from smoe.train.evaluate import read_run
from smoe.train.finetune import pretrained_record
from smoe.train.resume import read_config
from transformer_xl.classify import Classification, Classifier, ClassifierOutput, ClassifyConfig

# What the student takes from its teacher.
_OF_THE_TEACHER = ("num_layers", "d_model", "num_heads", "d_head", "seq_len")


@dataclass(frozen=True, kw_only=True)
class DistilConfig(ClassifyConfig):
    """One student."""

    teacher: str | None = required("the run of transformer_xl.classify to learn from")
    soft_weight: float = option(0.5, "of the teacher's word, against the labels'", at_least=0, at_most=1)
    temperature: float = option(2.0, "that teacher's and student's logits are divided by", above=0)

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values = super().inherited(given)
        if given.get("teacher") is None:
            raise ValueError("teacher: missing; give --teacher with a run of transformer_xl.classify")
        recorded = read_config(given["teacher"])
        if "d_head" not in recorded or "seq_len" not in recorded:
            raise ValueError(f"teacher: {given['teacher']} is not a run of transformer_xl.classify")
        own = {name: recorded[name] for name in _OF_THE_TEACHER}
        width = recorded["d_hidden"] // recorded["num_experts"]
        return {"method": "dense_dropout", **own, "d_hidden": width, **values}


class Distillation(Classification):
    """Classifies sentences as a teacher does."""

    name = "distillation"
    config_class = DistilConfig
    title = "Transformer-XL student"
    config: DistilConfig

    def __init__(self, config: DistilConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        # In a list, so that it is no part of the model: it is neither trained nor saved.
        self._teacher: list[Classifier] = []
        if config.teacher is None:  # the student is only measured
            return
        recorded, checkpoint = read_run(config.teacher, ClassifyConfig, "a Transformer-XL classifier")
        teacher = Classifier(recorded.build_model(), num_classes=2)
        teacher.load_state_dict(checkpoint.tensors["model"])
        self.record["teacher"] = {"method": recorded.method, "d_hidden": recorded.d_hidden}
        self.record["teacher"] |= pretrained_record(recorded, checkpoint)
        if recorded.get_method().routed:
            set_top_k(teacher, recorded.num_experts)
            self.record["teacher"] |= {
                name: getattr(recorded, name) for name in ("num_experts", "score", "output_scale")
            }
        self._teacher.append(teacher.eval().requires_grad_(False))

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> ClassifierOutput:
        output = super().forward(model, batch, device)
        if not model.training:
            return output
        (teacher,) = self._teacher
        with torch.no_grad():
            soft = super().forward(teacher.to(device), batch, device).logits
        return ClassifierOutput(
            distillation_loss(output.loss, output.logits, soft, self.config.soft_weight, self.config.temperature),
            output.logits,
        )


def distillation_loss(
    hard: Tensor, logits: Tensor, teacher_logits: Tensor, soft_weight: float, temperature: float
) -> Tensor:
    """The loss above, in nats per example. ``hard``: cross entropy with the labels; both logits: (B, classes)."""
    student, teacher = (F.log_softmax(own / temperature, dim=-1) for own in (logits, teacher_logits))
    soft = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return (1 - soft_weight) * hard + soft_weight * temperature**2 * soft


def main() -> None:
    run_training(Distillation, prog="python -m transformer_xl.distil")


if __name__ == "__main__":
    run_main(main)
