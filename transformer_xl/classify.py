"""Fine-tunes a Transformer-XL to classify sentences (SST-2, Table 2), from a pretrained run or from scratch.

    python -m transformer_xl.classify --run RUN --run_dir runs/sst2           # its method, sizes and weights
    python -m transformer_xl.classify --run RUN --run_dir runs/half --k_max 8 # with 8 experts per byte
    python -m transformer_xl.classify --run RUN --run_dir runs/kept --keep 8  # with the 8 experts that it votes for
    python -m transformer_xl.classify --method smoe --run_dir runs/scratch    # without pretraining

A linear layer on the last layer's output at a sentence's last byte gives the classes. All experts are activated
throughout, unless ``--k_min``, ``--k_max`` and ``--schedule`` say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe.errors import run_main
from smoe.options import option
from smoe.train.choosing import Choosing
from smoe.train.command import run_training
from smoe.train.examples import count_flops, read_examples
from smoe.train.finetune import FineTuned, pretrained_record
from smoe.train.predictions import Predictions
from smoe.train.processes import Processes
from smoe.train.sentence_floors import floor_notes, sentence_floors
from smoe.train.task import equal_share
from transformer_xl.config import LanguageModelConfig, RunConfig
from transformer_xl.model import TransformerXL


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(FineTuned, RunConfig):
    """One run of a Transformer-XL as a classifier."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "classification.yaml"

    of_the_run: ClassVar[tuple[str, ...]] = (*FineTuned.of_the_run, "d_head")
    data: str = option("data/sst2", "a folder of data/sst2/prepare.py")
    seq_len: int = option(256, "of a longer sentence the last so many bytes", at_least=1)

    def training_examples(self) -> int:
        return len(_read(self)[1]["train"])


class ClassifierOutput(NamedTuple):
    """``loss``: mean nats per sentence; ``logits (B, classes)``; both float32."""

    loss: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """A Transformer-XL with a linear layer on the output at the last byte of each sentence."""

    def __init__(self, encoder: TransformerXL, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.output_bias.requires_grad_(False)  # of the language model's head, which is not used
        self.head = nn.Linear(encoder.config.d_model, num_classes)

    def forward(self, input_ids: Tensor, lengths: Tensor, labels: Tensor) -> ClassifierOutput:
        """``input_ids (B, T)``, padded at the end; ``lengths (B,)``; ``labels (B,)``."""
        hidden, _ = self.encoder.encode(input_ids)
        last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
        logits = self.head(self.encoder.dropout(last)).float()
        return ClassifierOutput(F.cross_entropy(logits, labels), logits)


class Classification(Choosing):
    """Classifies sentences. SST-2's test split has no public labels, so its 872 dev sentences are what is reported."""

    name = "classification"
    splits = ("valid",)
    names = ("0", "1")
    config_class = ClassifyConfig
    architecture, title = "transformer_xl", "Transformer-XL classifier"
    config: ClassifyConfig

    def __init__(self, config: ClassifyConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        self.dataset, self.data = _read(config)
        train, size = self.data["train"], config.batch_size
        if size > len(train):
            raise ValueError(f"batch_size is {size}; it must be at most the {len(train)} sentences to train on")
        self.share, self.dealer = equal_share(size, rank, world_size), self.deal(train)
        self.predictions = Predictions()
        self.tokens_per_step = round(size * sum(len(text) for text, _ in train) / len(train))
        self.step_shape = f"{size} sentences"
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        self.blocks = self.model.encoder.layers
        self.load_pretrained()

    def load_run(self) -> dict[str, Any]:
        pretrained, checkpoint = self.config.read_pretrained(LanguageModelConfig, "a Transformer-XL")
        self.model.encoder.load_state_dict(checkpoint.tensors["model"])
        return pretrained_record(pretrained, checkpoint)

    def token_mask(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, lengths, _ = batch
        return torch.arange(ids.shape[1]) < lengths.unsqueeze(1)

    def build_model(self) -> Classifier:
        return Classifier(self.config.build_model(), num_classes=2)

    def answer(self, example: tuple[bytes, int]) -> int:
        return example[1]

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.collate([self.data["train"][i] for i in self.dealer.batch(step)[self.share]])

    def padded(self, example: tuple[bytes, int]) -> int:
        return len(example[0])

    def collate(self, examples: Sequence[tuple[bytes, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, T), lengths and labels (B,). Causal attention never reads the zeros that pad the end."""
        texts = [torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64)) for text, _ in examples]
        lengths, labels = torch.tensor([len(text) for text in texts]), torch.tensor([label for _, label in examples])
        return nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths, labels

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> ClassifierOutput:
        return model(*(part.to(device) for part in batch))

    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        c = self.config
        one_pass, batch = (self.collate([(b" " * c.seq_len, 0)] * size) for size in (c.eval_batch_size, c.batch_size))
        return count_flops(c, model, one_pass, batch, k)

    def result_files(self, processes: Processes) -> dict[str, str]:
        return self.predictions.files(self.config.sweep_ks(), processes)

    def notes(self) -> list[str]:
        # Here: a bag of words takes seconds, which evaluating or slimming a run should not.
        splits = {
            split: [(text.decode(errors="replace"), label) for text, label in rows] for split, rows in self.data.items()
        }
        self.record |= sentence_floors(splits)
        return floor_notes(self.record, self.splits[-1])


def _read(config: ClassifyConfig) -> tuple[dict[str, Any], dict[str, list[tuple[bytes, int]]]]:
    """The record of the prepared data and the sentences, cut to the last ``seq_len`` bytes."""

    def sentence(row: dict[str, Any]) -> tuple[bytes, int]:
        if row["label"] not in (0, 1):
            raise ValueError(f"label {row['label']!r}, expected 0 or 1")
        return row["text"].encode()[-config.seq_len :] or b" ", row["label"]

    splits = {"train": "train", "valid": "valid"}
    return read_examples(Path(config.data), splits, sentence, f"run: python data/sst2/prepare.py --out {config.data}")


def main() -> None:
    run_training(Classification, prog="python -m transformer_xl.classify")


if __name__ == "__main__":
    run_main(main)
