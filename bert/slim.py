"""A BERT or RoBERTa run with fewer experts, as a run folder of its own.

python -m bert.slim RUN --keep 8 --out DIR [--data DIR] [--score count|weight|reap] [--k K] [--batches 64]
"""

from __future__ import annotations

from collections.abc import Sequence

from bert.classify import Classification
from bert.math_word_problems import MathWordProblems
from bert.multiple_choice import MultipleChoice
from bert.pretrain import MaskedLanguageModel
from bert.question_answering import QuestionAnswering
from smoe.errors import run_main
from smoe.train.slim_run import slim_command


def main(argv: Sequence[str] | None = None) -> None:
    tasks = (MaskedLanguageModel, Classification, MultipleChoice, MathWordProblems, QuestionAnswering)
    slim_command(*tasks, prog="python -m bert.slim", what="a BERT or RoBERTa", argv=argv)


if __name__ == "__main__":
    run_main(main)
