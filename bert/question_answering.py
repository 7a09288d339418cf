"""Fine-tunes a BERT or RoBERTa to answer questions about paragraphs (HotpotQA, Table A6).

    python -m bert.question_answering --run RUN --run_dir runs/hotpotqa             # its method, sizes and weights
    python -m bert.question_answering --run RUN --k_max 8 --run_dir runs/half       # with 8 experts per token
    python -m bert.question_answering --run RUN --keep 8 --run_dir runs/kept        # with the 8 experts it votes for
    python -m bert.question_answering --method smoe --model bert --tokenizer FILE --run_dir runs/scratch

The paragraphs are longer than a sequence, so they are read in windows that overlap: question, the words yes and no, a
chunk of the paragraphs. The model marks where the answer starts and ends, in the chunk or one of the two words, or the
first token where the window has no answer (``bert/span_reader.py``). A step trains on one window of each question of
its batch, drawn from (seed, step). To answer a question all of its windows are read, and the best span of all counts.
That answer must be the right one but for capitals, articles and punctuation (exact match).

A share of the training questions is kept apart, and chooses the best checkpoint. The other splits are looked at once,
at the end: the test questions, and questions (``multi_hop``) with the two that each is made of (``single_hop``). From
these comes what the record says under ``compositionality``. predictions*.jsonl have the answer to each question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bert.answers import f1, is_exact
from bert.finetune import FineTuneConfig, FineTuning, build_encoder, pad_ids, split_off_valid
from bert.span_reader import SpanReader, best_spans
from smoe.errors import run_main
from smoe.metrics import Metric
from smoe.options import option
from smoe.train.command import run_training
from smoe.train.examples import count_flops, read_examples
from smoe.train.predictions import Predictions
from smoe.train.processes import Processes

SAID = ("yes", "no")


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig(FineTuneConfig):
    """One run on a set of questions with paragraphs."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "question_answering.yaml"

    data: str = option("data/hotpotqa", "a folder of data/hotpotqa/prepare.py")
    seq_len: int = option(384, "tokens of a window: the question and a chunk of the paragraphs", at_least=8)
    overlap: int = option(128, "tokens of the paragraphs that a window shares with the next one", at_least=0)
    answer_share: float = option(
        0.5, "share of the training windows that are drawn from those with the answer, if there are any", at_least=0,
        at_most=1,
    )  # fmt: skip
    max_answer: int = option(30, "the most tokens of an answer that is found", at_least=1)

    def training_examples(self) -> int:
        return len(read_questions(self)[1]["train"])


@dataclass(frozen=True)
class Question:
    """``span``: [start, end) of the answer in ``context``, in characters; None if it is yes or no, or not there."""

    text: str
    context: str
    answer: str
    span: tuple[int, int] | None
    kind: str
    titles: Sequence[str]


@dataclass(frozen=True)
class Encoded:
    """A question in tokens.

    head: all before the chunk. second: where the second part (yes, no, chunk) starts.
    ids, places: of the context (n,) and where each token is in it, in characters (n, 2).
    label: first and last token of the answer in ``ids``, or of yes or no after ``second``; None if it is nowhere.
    """

    head: Sequence[int]
    second: int
    ids: np.ndarray
    places: np.ndarray
    question: Question
    label: tuple[int, int] | None


class Window(NamedTuple):
    """``span``: first and last token of the answer in ``ids``; 0 and 0 if it is not in the window."""

    ids: Sequence[int]
    second: int
    span: tuple[int, int]


class QuestionAnswering(FineTuning):
    """Answers questions about paragraphs."""

    name = "question_answering"
    metrics = (
        Metric("exact_match", "Exact match", "share of n questions", "higher"),
        Metric("f1", "F1", "mean over n questions", "higher"),
    )
    splits = ("valid", "test", "multi_hop", "single_hop")
    config_class = QuestionAnsweringConfig
    config: QuestionAnsweringConfig

    def read_data(self) -> dict[str, list[Encoded]]:
        self.dataset, splits = read_questions(self.config)
        self.record["floors"] = floors(splits)
        self.record["answerable"] = {
            split: sum(q.span is not None or q.answer in SAID for q in questions) / len(questions)
            for split, questions in splits.items()
        }
        self.kept = {split: Predictions() for split in self.splits}
        self.predictions = self.kept["test"]
        self.step_shape = f"{self.config.batch_size} questions, a window of each"
        # Yes and no, each as first and last token after `second`.
        words = [self.tokens(word) for word in SAID]
        self.said = [(0, len(words[0]) - 1), (len(words[0]), len(words[0]) + len(words[1]) - 1)]
        return {split: [self.encode(question) for question in questions] for split, questions in splits.items()}

    def build_model(self) -> SpanReader:
        c = self.config
        return SpanReader(build_encoder(c, self.vocabulary), c.residual_rate(), c.init_std)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, question: Question) -> Encoded:
        """BERT: [CLS] question [SEP] yes no chunk [SEP]; RoBERTa: <s> question </s></s> yes no chunk </s>."""
        start, end = self.vocabulary.start, self.vocabulary.end
        head = [start, *self.tokens(question.text), *([end] if self.config.model == "bert" else [end, end])]
        second = len(head)
        found = self.tokenizer.encode(question.context, add_special_tokens=False)
        places = np.array(found.offsets, dtype=np.int32).reshape(-1, 2)
        label = None
        if question.answer in SAID:
            label = self.said[SAID.index(question.answer)]
        elif question.span is not None:
            # The tokens that have a character of the answer; places are in order.
            inside = (places[:, 1] > question.span[0]) & (places[:, 0] < question.span[1])
            label = (int(inside.argmax()), int(inside.nonzero()[0][-1])) if inside.any() else None
        head += [token for word in SAID for token in self.tokens(word)]
        return Encoded(head, second, np.array(found.ids, dtype=np.int32), places, question, label)

    def lengths(self, example: Encoded) -> list[int]:
        """Of a window; never less than what one must hold to get any further."""
        around = len(example.head) + 1
        return [max(around + self.config.overlap + 1, min(around + len(example.ids), self.config.seq_len))]

    # ---- windows ----------------------------------------------------------------------------------------------------
    def room(self, example: Encoded) -> int:
        """How many tokens the chunk of a window has at most."""
        return self.config.seq_len - len(example.head) - 1

    def starts(self, example: Encoded) -> range:
        """Where in the context the chunks of its windows start; the last chunk ends with it."""
        overlap = self.config.overlap
        return range(0, max(len(example.ids) - overlap, 1), self.room(example) - overlap)

    def window(self, example: Encoded, start: int) -> Window:
        """The one whose chunk starts at token ``start`` of the context."""
        chunk = example.ids[start : start + self.room(example)]
        span = (0, 0)
        if example.label is not None and example.question.answer in SAID:
            span = (example.second + example.label[0], example.second + example.label[1])
        elif example.label is not None and start <= example.label[0] and example.label[1] < start + len(chunk):
            shift = len(example.head) - start
            span = (example.label[0] + shift, example.label[1] + shift)
        return Window([*example.head, *chunk.tolist(), self.vocabulary.end], example.second, span)

    def drawn(self, example: Encoded, chance: float, place: float) -> Window:
        """A window to train on, from two random numbers in [0, 1)."""
        starts: Sequence[int] = self.starts(example)
        if chance < self.config.answer_share and example.label is not None and example.question.answer not in SAID:
            first, last = example.label
            holding = [start for start in starts if start <= first and last < start + self.room(example)]
            starts = holding or starts
        return self.window(example, starts[int(place * len(starts))])

    def batch(self, step: int) -> tuple[Tensor, ...]:
        c, train = self.config, self.data["train"]
        chances = np.random.default_rng([c.seed, step, 1]).random((c.batch_size, 2))
        mine = zip(self.dealer.batch(step)[self.share], chances[self.share].tolist(), strict=True)
        return self.collate([self.drawn(train[i], *two) for i, two in mine])

    def collate(self, examples: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids = pad_ids([window.ids for window in examples], self.vocabulary.pad)
        place = torch.arange(ids.shape[1])
        second = torch.tensor([window.second for window in examples])[:, None]
        lengths = torch.tensor([len(window.ids) for window in examples])[:, None]
        after = (place >= second) & (place < lengths)
        allowed = (after & (place < lengths - 1)) | (place == 0)
        # RoBERTa has one type of tokens.
        types = (after & (self.config.model == "bert")).long()
        return ids, types, allowed, torch.tensor([window.span for window in examples])

    # ---- measuring --------------------------------------------------------------------------------------------------
    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        examples, kept, size = self.data[split], self.kept[split].at(model), self.config.eval_batch_size
        starts = [self.starts(example) for example in examples]
        n, ranks = len(examples), self.world_size
        shares = [range(rank * n // ranks, (rank + 1) * n // ranks) for rank in range(ranks)]
        mine = [(i, start) for i in shares[self.rank] for start in starts[i]]
        left = {i: len(starts[i]) for i in shares[self.rank]}
        best: dict[int, tuple[float, str]] = {}
        for number in range(max(-(-sum(len(starts[i]) for i in share) // size) for share in shares)):
            part = mine[number * size : (number + 1) * size]
            sums = torch.zeros(3, dtype=torch.float64, device=device)
            for (i, _), (score, answer) in zip(part, self.answers(model, examples, part, device), strict=False):
                best[i] = max(best.get(i, (-np.inf, "")), (score, answer), key=lambda found: found[0])
                left[i] -= 1
                if not left[i]:
                    right = examples[i].question.answer
                    kept[str(i)] = (best[i][1], is_exact(best[i][1], right))
                    sums += torch.tensor([kept[str(i)][1], f1(best[i][1], right), 1], dtype=torch.float64).to(device)
            yield sums

    def answers(
        self, model: nn.Module, examples: Sequence[Encoded], part: Sequence[tuple[int, int]], device: torch.device
    ) -> list[tuple[float, str]]:
        """The score and the answer of each window in ``part``, as (example, start); of a first one if it is empty."""
        part = part or [(0, 0)]
        batch = self.collate([self.window(examples[i], start) for i, start in part])
        logits = self.forward(model, batch, device).logits
        heads = torch.tensor([len(examples[i].head) for i, _ in part])[:, None]
        chunk = batch[2] & (torch.arange(batch[2].shape[1]) >= heads)
        words = torch.tensor([[[examples[i].second + place for place in word] for word in self.said] for i, _ in part])
        spans = best_spans(logits, chunk.to(device), words.to(device), self.config.max_answer)
        found = []
        for (i, start), score, first, last in zip(part, *(values.tolist() for values in spans), strict=True):
            example, shift = examples[i], start - len(examples[i].head)
            if first < len(example.head):
                answer = SAID[self.said.index((first - example.second, last - example.second))]
            else:
                answer = example.question.context[example.places[first + shift][0] : example.places[last + shift][1]]
            found.append((score, answer))
        return found

    def values(self, sums: list[float]) -> dict[str, float]:
        exact, overlap, questions = sums
        return {"exact_match": exact / questions, "f1": overlap / questions}

    def result_files(self, processes: Processes) -> dict[str, str]:
        ks = self.config.sweep_ks()
        parts = {split: self.kept[split].joined(ks, processes) for split in ("multi_hop", "single_hop")}
        self.record["compositionality"] = {
            k: compositionality(*({i: right for i, (_, right) in found[k].items()} for found in parts.values()))
            for k in parts["multi_hop"]
        }
        files = super().result_files(processes)
        for split in parts:
            files |= self.kept[split].files(ks, processes, f"predictions_{split}.jsonl")
        return files

    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        """Of windows of ``seq_len`` tokens."""
        c = self.config
        longest = Window([self.vocabulary.unknown] * c.seq_len, 1, (0, 0))
        one_pass, batch = (self.collate([longest] * size) for size in (c.eval_batch_size, c.batch_size))
        return count_flops(c, model, one_pass, batch, k)


def compositionality(multi_hop: Mapping[str, bool], single_hop: Mapping[str, bool]) -> dict[str, Any]:
    """The compositionality gap, in both of its forms, from which questions are answered right.

    ``gap`` is that of Press et al. 2022: of the questions whose single-hop questions are both answered right, the share
    answered wrong; None if there are none. ``exact_match_difference`` is the paper's (section A2.3): the exact match of
    the single-hop questions less that of the multi-hop ones.

    Args:
        multi_hop: by number ("0", "1", ...). single_hop: those of question i are 2 i and 2 i + 1.
    """
    both = [i for i in multi_hop if single_hop[str(2 * int(i))] and single_hop[str(2 * int(i) + 1)]]
    wrong = sum(not multi_hop[i] for i in both)
    multi, single = (sum(right.values()) / len(right) for right in (multi_hop, single_hop))
    return {
        "gap": wrong / len(both) if both else None,
        "exact_match_difference": single - multi,
        "exact_match": {"multi_hop": multi, "single_hop": single},
        "n": {"multi_hop": len(multi_hop), "single_hop": len(single_hop), "both_single_hop_right": len(both)},
    }


def read_questions(config: QuestionAnsweringConfig) -> tuple[dict[str, Any], dict[str, list[Question]]]:
    """The record of the data set, and train, valid, test, and the composed questions with their parts."""

    def question(row: dict[str, Any]) -> Question:
        text, context, answer, titles, span = row["question"], row["context"], row["answer"], row["titles"], row["span"]
        for value in (text, context, answer, *titles):
            if not isinstance(value, str):
                raise ValueError(f"{value!r}, expected text")
        if span is not None:
            start, end = span
            if not 0 <= start < end <= len(context):
                raise ValueError(f"span {list(span)}, expected a part of the context's {len(context)} characters")
            span = (start, end)
        return Question(text, context, answer, span, str(row["type"]), titles)

    parts = {split: split for split in ("train", "test", "multi_hop", "single_hop")}
    advice = f"run: python data/hotpotqa/prepare.py --out {config.data}"
    facts = ("examples", "yes_or_no", "answerable", "with_all_gold_paragraphs", "files")
    dataset, data = read_examples(Path(config.data), parts, question, advice, facts)
    multi, single = len(data["multi_hop"]), len(data["single_hop"])
    if single != 2 * multi:
        raise ValueError(f"data: {config.data} has {single} single_hop questions, expected two for each of {multi}")
    return dataset, {**split_off_valid(data.pop("train"), config, lambda q: q.text), **data}


def floors(splits: dict[str, list[Question]]) -> dict[str, dict[str, float]]:
    """Exact match of answers that nobody has to read for.

    - ``most_frequent_answer``: that of train.
    - ``yes_to_comparisons``: yes where two things are compared, else the same.
    - ``title_in_question``: the title of the first paragraph that the question names, else that of the first one.
    """
    answer = max((count, said) for said, count in Counter(q.answer for q in splits["train"]).items())[1]
    guesses = {
        "most_frequent_answer": lambda q: answer,
        "yes_to_comparisons": lambda q: "yes" if q.kind == "comparison" else answer,
        "title_in_question": lambda q: next((t for t in q.titles if t in q.text), q.titles[0] if q.titles else ""),
    }
    return {
        name: {
            split: sum(is_exact(guess(q), q.answer) for q in splits[split]) / len(splits[split])
            for split in QuestionAnswering.splits
        }
        for name, guess in guesses.items()
    }


def main() -> None:
    run_training(QuestionAnswering, prog="python -m bert.question_answering")


if __name__ == "__main__":
    run_main(main)
