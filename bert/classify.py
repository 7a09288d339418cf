"""Fine-tunes a BERT or RoBERTa to classify sentences (SST-2).

    python -m bert.classify --run RUN --run_dir runs/sst2             # its method, sizes and weights
    python -m bert.classify --run RUN --keep 8 --run_dir runs/kept    # with the 8 experts that it votes for
    python -m bert.classify --method smoe --model bert --tokenizer FILE --run_dir runs/scratch

As ``BertForSequenceClassification``: a linear layer on the pooled first token scores the classes. In the paper a
Transformer-XL does this task (``transformer_xl/classify.py``). SST-2's test split has no public labels: its 872 dev
sentences are what is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert.finetune import FineTuneConfig, FineTuning, build_encoder, pad_ids
from bert.pooled import Pooled, PooledOutput
from smoe.errors import run_main
from smoe.options import option
from smoe.train.choosing import Choosing
from smoe.train.command import run_training
from smoe.train.examples import count_flops, read_examples
from smoe.train.sentence_floors import sentence_floors


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(FineTuneConfig):
    """One run on a set of sentences."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "classification.yaml"

    data: str = option("data/sst2", "a folder of data/sst2/prepare.py")

    def training_examples(self) -> int:
        return len(read_sentences(self)[1]["train"])


class Classifier(Pooled):
    """A score per class."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> PooledOutput:
        """``input_ids (B, T)``, padded at the end; ``labels (B,)``."""
        logits = self.scores(input_ids)
        return PooledOutput(F.cross_entropy(logits, labels), logits)


class Classification(Choosing, FineTuning):
    """Classifies sentences; an example is (its ids, its label)."""

    name = "classification"
    splits = ("valid",)
    names = ("0", "1")
    config_class = ClassifyConfig
    config: ClassifyConfig

    def read_data(self) -> dict[str, list[tuple[list[int], int]]]:
        self.dataset, splits = read_sentences(self.config)
        self.sentences = splits
        self.step_shape = f"{self.config.batch_size} sentences"
        return {split: [(self.encode(text), label) for text, label in rows] for split, rows in splits.items()}

    def build_model(self) -> Classifier:
        c = self.config
        return Classifier(build_encoder(c, self.vocabulary), len(self.names), c.residual_rate(), c.init_std)

    def encode(self, text: str) -> list[int]:
        """BERT: [CLS] sentence [SEP]; RoBERTa: <s> sentence </s>."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.vocabulary.start, *ids, self.vocabulary.end]

    def lengths(self, example: tuple[list[int], int]) -> list[int]:
        return [len(example[0])]

    def answer(self, example: tuple[list[int], int]) -> int:
        return example[1]

    def collate(self, examples: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        ids, labels = zip(*examples, strict=True)
        return pad_ids(ids, self.vocabulary.pad), torch.tensor(labels)

    def notes(self) -> list[str]:
        self.record |= sentence_floors(self.sentences)  # here: it takes seconds, which evaluating a run should not
        return super().notes()

    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        """Of sentences of ``seq_len`` tokens."""
        c = self.config
        longest = ([self.vocabulary.unknown] * c.seq_len, 0)
        one_pass, batch = (self.collate([longest] * size) for size in (c.eval_batch_size, c.batch_size))
        return count_flops(c, model, one_pass, batch, k)


def read_sentences(config: ClassifyConfig) -> tuple[dict[str, Any], dict[str, list[tuple[str, int]]]]:
    """The record of the data set, and the sentences of train and valid."""

    def sentence(row: dict[str, Any]) -> tuple[str, int]:
        if row["label"] not in (0, 1):
            raise ValueError(f"label {row['label']!r}, expected 0 or 1")
        return row["text"], row["label"]

    splits = {"train": "train", "valid": "valid"}
    return read_examples(Path(config.data), splits, sentence, f"run: python data/sst2/prepare.py --out {config.data}")


def main() -> None:
    run_training(Classification, prog="python -m bert.classify")


if __name__ == "__main__":
    run_main(main)
