"""Fine-tunes a BERT or RoBERTa to choose one of several answers (CommonsenseQA, Table 2).

    python -m bert.multiple_choice --run RUN --run_dir runs/csqa             # its method, sizes and weights
    python -m bert.multiple_choice --run RUN --k_max 8 --run_dir runs/half   # with 8 experts per token
    python -m bert.multiple_choice --run RUN --keep 8 --run_dir runs/kept    # with the 8 experts that it votes for
    python -m bert.multiple_choice --method smoe --model bert --tokenizer FILE --run_dir runs/scratch

As Hugging Face's ``run_swag`` and ``BertForMultipleChoice``: question and choice are read as a pair, once per choice,
and a linear layer on the pooled first token scores it. A share of the training questions is kept apart, and chooses the
best checkpoint; the test questions are looked at once, at the end. predictions.jsonl has what was chosen for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert.finetune import FineTuneConfig, FineTuning, build_encoder, pad_ids, split_off_valid
from bert.pooled import Pooled, PooledOutput
from smoe.errors import run_main
from smoe.options import option
from smoe.train.choosing import Choosing
from smoe.train.command import run_training
from smoe.train.examples import count_flops, read_examples

LABELS = "ABCDE"


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceConfig(FineTuneConfig):
    """One run on a set of questions."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "multiple_choice.yaml"

    data: str = option("data/csqa", "a folder of data/csqa/prepare.py")

    def training_examples(self) -> int:
        return len(read_questions(self)[1]["train"])


@dataclass(frozen=True)
class Question:
    """``answer``: the index of the right one of ``choices``."""

    text: str
    choices: Sequence[str]
    answer: int


@dataclass(frozen=True)
class Encoded:
    """Per choice the tokens of the pair, and how many of them are the question's."""

    ids: Sequence[Sequence[int]]
    first: int
    answer: int


class Chooser(Pooled):
    """A score per choice, as ``BertForMultipleChoice``."""

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, answers: Tensor) -> PooledOutput:
        """``input_ids`` and ``token_type_ids`` (B, choices, T), padded at the end; ``answers (B,)``."""
        batch, choices, _ = input_ids.shape
        scores = self.scores(input_ids.flatten(0, 1), token_type_ids=token_type_ids.flatten(0, 1))
        logits = scores.view(batch, choices)
        return PooledOutput(F.cross_entropy(logits, answers), logits)


class MultipleChoice(Choosing, FineTuning):
    """Chooses the answer of a question."""

    name = "multiple_choice"
    names = LABELS
    config_class = MultipleChoiceConfig
    config: MultipleChoiceConfig

    def read_data(self) -> dict[str, list[Encoded]]:
        self.dataset, splits = read_questions(self.config)
        self.record["floors"] = floors(splits)
        self.step_shape = f"{self.config.batch_size} questions x {len(LABELS)} choices"
        return {split: [self.encode(question) for question in questions] for split, questions in splits.items()}

    def build_model(self) -> Chooser:
        return Chooser(
            build_encoder(self.config, self.vocabulary), 1, self.config.residual_rate(), self.config.init_std
        )

    def encode(self, question: Question) -> Encoded:
        """BERT: [CLS] question [SEP] choice [SEP]; RoBERTa: <s> question </s></s> choice </s>."""
        start, end = self.vocabulary.start, self.vocabulary.end
        between = [end] if self.config.model == "bert" else [end, end]
        text, *choices = (
            self.tokenizer.encode(part, add_special_tokens=False).ids for part in (question.text, *question.choices)
        )
        first = [start, *text, *between]
        return Encoded([[*first, *choice, end] for choice in choices], len(first), question.answer)

    def answer(self, example: Encoded) -> int:
        return example.answer

    def lengths(self, example: Encoded) -> list[int]:
        return [len(ids) for ids in example.ids]

    def collate(self, examples: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        ids = pad_ids([pair for example in examples for pair in example.ids], self.vocabulary.pad)
        ids = ids.view(len(examples), len(LABELS), -1)
        firsts = torch.tensor([example.first for example in examples])[:, None, None]
        # RoBERTa has one type of tokens.
        second = (torch.arange(ids.shape[-1]) >= firsts) & (ids != self.vocabulary.pad) & (self.config.model == "bert")
        return ids, second.long(), torch.tensor([example.answer for example in examples])

    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        """Of pairs of ``seq_len`` tokens."""
        c = self.config
        longest = Encoded([[self.vocabulary.unknown] * c.seq_len] * len(LABELS), 1, 0)
        one_pass, batch = (self.collate([longest] * size) for size in (c.eval_batch_size, c.batch_size))
        return count_flops(c, model, one_pass, batch, k)


def read_questions(config: MultipleChoiceConfig) -> tuple[dict[str, Any], dict[str, list[Question]]]:
    """The record of the data set, and train, valid and test."""

    def question(row: dict[str, Any]) -> Question:
        if len(row["choices"]) != len(LABELS):
            raise ValueError(f"a question has {len(row['choices'])} choices, expected {len(LABELS)}")
        if row["answer"] not in range(len(LABELS)):
            raise ValueError(f"answer {row['answer']!r}, expected 0 to {len(LABELS) - 1}")
        return Question(row["question"], row["choices"], row["answer"])

    parts = {"train": "train", "test": "test"}
    advice = f"run: python data/csqa/prepare.py --out {config.data}"
    dataset, data = read_examples(Path(config.data), parts, question, advice)
    return dataset, {**split_off_valid(data["train"], config, lambda q: q.text), "test": data["test"]}


def floors(splits: dict[str, list[Question]]) -> dict[str, dict[str, float]]:
    """What is right by chance, and by always choosing the letter that is right most often in train."""
    letter = Counter(question.answer for question in splits["train"]).most_common(1)[0][0]
    shares = {s: sum(q.answer == letter for q in splits[s]) / len(splits[s]) for s in ("valid", "test")}
    return {"chance": {split: 1 / len(LABELS) for split in shares}, "most_frequent_letter": shares}


def main() -> None:
    run_training(MultipleChoice, prog="python -m bert.multiple_choice")


if __name__ == "__main__":
    run_main(main)
