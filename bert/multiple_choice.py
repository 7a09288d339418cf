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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert.finetune import FineTuneConfig, FineTuning, build_encoder, encode, pad_ids, split_off_valid
from smoe.dropout import Dropout
from smoe.errors import run_main
from smoe.metrics import Metric
from smoe.options import option
from smoe.train.command import run_training
from smoe.train.examples import count_flops, evaluation_slices, read_examples

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


class ChoiceOutput(NamedTuple):
    """``loss``: mean nats per question; ``logits (B, choices)``; both float32."""

    loss: Tensor
    logits: Tensor


class Chooser(nn.Module):
    """An encoder with a pooler on the first token and a score per choice, as ``BertForMultipleChoice``."""

    def __init__(self, encoder: PreTrainedModel, dropout: float, init_std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooler = nn.Linear(encoder.config.hidden_size, encoder.config.hidden_size)
        self.dropout = Dropout(dropout)
        self.score = nn.Linear(encoder.config.hidden_size, 1)
        for linear in (self.pooler, self.score):
            nn.init.normal_(linear.weight, 0.0, init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, answers: Tensor) -> ChoiceOutput:
        """``input_ids`` and ``token_type_ids`` (B, choices, T), padded at the end; ``answers (B,)``."""
        batch, choices, _ = input_ids.shape
        hidden = encode(self.encoder, input_ids.flatten(0, 1), token_type_ids=token_type_ids.flatten(0, 1))
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        logits = self.score(self.dropout(pooled)).float().view(batch, choices)
        return ChoiceOutput(F.cross_entropy(logits, answers), logits)


class MultipleChoice(FineTuning):
    """Chooses the answer of a question."""

    name = "multiple_choice"
    metrics = (Metric("accuracy", "Accuracy", "share of n examples", "higher"),)
    config_class = MultipleChoiceConfig
    config: MultipleChoiceConfig

    def read_data(self) -> dict[str, list[Encoded]]:
        self.dataset, splits = read_questions(self.config)
        self.record["floors"] = floors(splits)
        self.step_shape = f"{self.config.batch_size} questions x {len(LABELS)} choices"
        return {split: [self.encode(question) for question in questions] for split, questions in splits.items()}

    def build_model(self) -> Chooser:
        return Chooser(build_encoder(self.config, self.vocabulary), self.config.residual_rate(), self.config.init_std)

    def encode(self, question: Question) -> Encoded:
        """BERT: [CLS] question [SEP] choice [SEP]; RoBERTa: <s> question </s></s> choice </s>."""
        start, end = self.vocabulary.start, self.vocabulary.end
        between = [end] if self.config.model == "bert" else [end, end]
        text, *choices = (
            self.tokenizer.encode(part, add_special_tokens=False).ids for part in (question.text, *question.choices)
        )
        first = [start, *text, *between]
        return Encoded([[*first, *choice, end] for choice in choices], len(first), question.answer)

    def lengths(self, example: Encoded) -> list[int]:
        return [len(ids) for ids in example.ids]

    def collate(self, examples: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        ids = pad_ids([pair for example in examples for pair in example.ids], self.vocabulary.pad)
        ids = ids.view(len(examples), len(LABELS), -1)
        firsts = torch.tensor([example.first for example in examples])[:, None, None]
        # RoBERTa has one type of tokens.
        second = (torch.arange(ids.shape[-1]) >= firsts) & (ids != self.vocabulary.pad) & (self.config.model == "bert")
        return ids, second.long(), torch.tensor([example.answer for example in examples])

    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        questions, kept = self.data[split], self.predictions.at(model)
        for mine in evaluation_slices(len(questions), self.config.eval_batch_size, self.rank, self.world_size):
            # Where others have one more pass, a question that does not count.
            batch = self.collate([questions[i] for i in mine] or questions[:1])
            chosen = self.forward(model, batch, device).logits.argmax(-1).tolist()
            right = 0
            for i, choice in zip(mine, chosen, strict=False):
                kept[str(i)] = (LABELS[choice], choice == questions[i].answer)
                right += choice == questions[i].answer
            yield torch.tensor([right, len(mine)], dtype=torch.float64, device=device)

    def values(self, sums: list[float]) -> dict[str, float]:
        right, questions = sums
        return {"accuracy": right / questions}

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
