"""Fine-tunes a BERT or RoBERTa to solve math word problems (ASDiv-A, MAWPS and SVAMP of Table 2).

    python -m bert.math_word_problems --run RUN --data data/mawps --fold 0 --run_dir runs/mawps
    python -m bert.math_word_problems --run RUN --k_max 8 ...            # with 8 experts per token
    python -m bert.math_word_problems --run RUN --keep 8 ...             # with the 8 experts that it votes for
    python -m bert.math_word_problems --method smoe --model bert --tokenizer FILE ...      # without pretraining

An attention decoder, trained from scratch, writes the equation in prefix form: operators, constants that train has, and
slots, the numbers of the text. The solving rate is the share of problems whose equation, computed, gives the answer
(``bert/equations.py``); one that is malformed solves nothing. A share of the training problems is kept apart, and
chooses the best checkpoint; the fold's test problems are looked at once, at the end. predictions.jsonl has what was
written for each of them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert import equations
from bert.equation_decoder import END, EquationDecoder, Problems
from bert.finetune import FineTuneConfig, FineTuning, build_encoder, encode, pad_ids, split_off_valid
from smoe.errors import run_main
from smoe.metrics import Metric
from smoe.options import option
from smoe.train.command import run_training
from smoe.train.examples import count_flops, evaluation_slices, read_examples

_NOT_COUNTED = -100


@dataclass(frozen=True, kw_only=True)
class MathConfig(FineTuneConfig):
    """One run on one fold of a set of word problems."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "math_word_problems.yaml"

    data: str = option("data/mawps", "a folder of data/asdiv_a/, data/mawps/ or data/svamp/prepare.py")
    fold: str = option("0", "0 to 4, or challenge (SVAMP: all of it, after training on MAWPS and ASDiv-A)")
    decoder_layers: int = option(2, "layers of the decoder", at_least=1)

    def training_examples(self) -> int:
        return len(read_problems(self)[1]["train"])


@dataclass(frozen=True)
class Problem:
    """``ids``: tokens of the text; ``slots``: where each number is in them."""

    question: str
    numbers: list[float]
    equation: list[str]
    answer: float
    ids: Sequence[int] = ()
    slots: Sequence[int] = ()


class SolverOutput(NamedTuple):
    """``loss``: the mean over problems of the mean nats per token of their equation; ``logits (B, L, symbols + S)``, 0
    after the end of an equation; both float32."""

    loss: Tensor
    logits: Tensor


class Solver(nn.Module):
    """An encoder of the text and a decoder that writes the equation."""

    def __init__(self, encoder: PreTrainedModel, decoder: EquationDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, input_ids: Tensor, slots: Tensor, targets: Tensor | None = None) -> SolverOutput | Tensor:
        """``input_ids (B, T)``, padded; ``slots (B, S)`` as in ``Problems``; ``targets (B, L)``: ids of the equation's
        tokens and its end, then -100. Without targets: the equations (B, max_length) that the decoder writes."""
        problems = Problems(encode(self.encoder, input_ids), input_ids == self.encoder.config.pad_token_id, slots)
        if targets is None:
            return self.decoder.write(problems)
        counts = targets != _NOT_COUNTED
        written = F.pad(targets[:, :-1], (1, 0), value=END).clamp(min=END)
        logits = self.decoder(problems, written) * counts.unsqueeze(-1)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return SolverOutput((nats.sum(1) / counts.sum(1).clamp(min=1)).mean(), logits)


class MathWordProblems(FineTuning):
    """Solves word problems by writing their equation."""

    name = "math_word_problems"
    metrics = (Metric("solving_rate", "Solving rate", "share of n problems", "higher"),)
    config_class = MathConfig
    config: MathConfig

    def read_data(self) -> dict[str, list[Problem]]:
        self.dataset, splits = read_problems(self.config)
        train = splits["train"]
        constants = {token for problem in train for token in problem.equation if equations.is_constant(token)}
        self.symbols = ["", *equations.OPERATORS, *sorted(constants, key=float)]  # the first one is END
        self.max_length = max(len(problem.equation) for problem in train) + 1
        self.max_slots = max(len(problem.numbers) for problems in splits.values() for problem in problems)
        self.facts |= {"symbols": self.symbols, "max_length": self.max_length}
        self.record |= {"fold": self.config.fold, "floors": floors(splits)}
        self.record["solved_by_their_equation"] = {
            split: sum(map(_is_solved, problems)) / len(problems) for split, problems in splits.items()
        }
        self.step_shape = f"{self.config.batch_size} problems"
        return {split: [self.encode(problem) for problem in problems] for split, problems in splits.items()}

    def build_model(self) -> Solver:
        c = self.config
        encoder = build_encoder(c, self.vocabulary)
        sizes = (c.d_model, c.num_heads, c.decoder_layers, len(self.symbols), self.max_length, c.residual_rate())
        return Solver(encoder, EquationDecoder(*sizes))

    def encode(self, problem: Problem) -> Problem:
        """With its tokens, and where in them its numbers are: at the first token of each."""
        encoded = self.tokenizer.encode(problem.question, add_special_tokens=False)
        slots, start = [], 0
        for i in range(len(problem.numbers)):
            start = problem.question.index(f"number{i}", start)
            slots.append(1 + next(j for j, (_, end) in enumerate(encoded.offsets) if end > start))
        ids = [self.vocabulary.start, *encoded.ids, self.vocabulary.end]
        return dataclasses.replace(problem, ids=ids, slots=slots)

    def lengths(self, example: Problem) -> list[int]:
        return [len(example.ids)]

    def collate(self, examples: Sequence[Problem]) -> tuple[Tensor, Tensor, Tensor]:
        symbols = {token: i for i, token in enumerate(self.symbols)}
        longest = max(len(problem.equation) for problem in examples) + 1
        targets = torch.full((len(examples), longest), _NOT_COUNTED)
        for row, problem in zip(targets, examples, strict=True):
            slots = [equations.slot_index(token) for token in problem.equation]
            ids = [
                symbols[token] if slot is None else len(symbols) + slot
                for token, slot in zip(problem.equation, slots, strict=True)
            ]
            row[: len(ids) + 1] = torch.tensor([*ids, END])
        return *self.texts(examples), targets

    def texts(self, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
        """The first two inputs of the model."""
        slots = [[*problem.slots, *[-1] * (self.max_slots - len(problem.slots))] for problem in problems]
        return pad_ids([problem.ids for problem in problems], self.vocabulary.pad), torch.tensor(slots)

    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        problems, kept = self.data[split], self.predictions.at(model)
        for mine in evaluation_slices(len(problems), self.config.eval_batch_size, self.rank, self.world_size):
            # Where others have one more pass, a problem that does not count.
            written = self.forward(model, self.texts([problems[i] for i in mine] or problems[:1]), device).tolist()
            solved = 0
            for i, ids in zip(mine, written, strict=False):
                equation = self.tokens(ids)
                right = equations.solves(equation, problems[i].numbers, problems[i].answer)
                kept[str(i)] = (" ".join(equation), right)
                solved += right
            yield torch.tensor([solved, len(mine)], dtype=torch.float64, device=device)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The equation that these ids are, up to its end."""
        named = [*self.symbols, *(f"number{i}" for i in range(self.max_slots))]
        return [named[i] for i in (ids[: ids.index(END)] if END in ids else ids)]

    def values(self, sums: list[float]) -> dict[str, float]:
        solved, problems = sums
        return {"solving_rate": solved / problems}

    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        """Of texts of ``seq_len`` tokens; the decoder reads the whole equation at once, as it does in training."""
        c = self.config
        longest = Problem(
            "", [0.0] * self.max_slots, ["number0"] * (self.max_length - 1), 0.0, [self.vocabulary.unknown] * c.seq_len
        )
        one_pass, batch = (self.collate([longest] * size) for size in (c.eval_batch_size, c.batch_size))
        return count_flops(c, model, one_pass, batch, k)


def read_problems(config: MathConfig) -> tuple[dict[str, Any], dict[str, list[Problem]]]:
    """The record of the data set, and train, valid and test of the fold."""

    def problem(row: dict[str, Any]) -> Problem:
        numbers, equation = [float(number) for number in row["numbers"]], row["equation"].split()
        equations.check(equation, len(numbers))
        equations.check_slots(row["question"], len(numbers))
        return Problem(row["question"], numbers, equation, float(row["answer"]))

    folder = Path(config.data)
    parts = {split: f"{config.fold}-{split}" for split in ("train", "test")}
    advice = f"run: python data/{folder.name}/prepare.py --out {folder}"
    dataset, data = read_examples(folder, parts, problem, advice)
    return dataset, {**split_off_valid(data["train"], config, lambda p: p.question), "test": data["test"]}


def floors(splits: dict[str, list[Problem]]) -> dict[str, dict[str, float]]:
    """What is solved by always writing the equation that train has most often."""
    counts = Counter(tuple(problem.equation) for problem in splits["train"])
    equation = max(counts, key=lambda found: (counts[found], found))
    solved = {
        split: sum(equations.solves(equation, p.numbers, p.answer) for p in splits[split]) / len(splits[split])
        for split in ("valid", "test")
    }
    return {"most_frequent_equation": solved}


def _is_solved(problem: Problem) -> bool:
    return equations.solves(problem.equation, problem.numbers, problem.answer)


def main() -> None:
    run_training(MathWordProblems, prog="python -m bert.math_word_problems")


if __name__ == "__main__":
    run_main(main)
