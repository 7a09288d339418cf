"""Bits per masked token, accuracy, solving rate or exact match of a trained BERT or RoBERTa at any k.

python -m bert.evaluate RUN --k 1 2 4 8 16 [--split test] [--json]
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from bert.classify import Classification
from bert.config import PretrainConfig
from bert.data import Vocabulary
from bert.math_word_problems import MathWordProblems
from bert.model import build_model
from bert.multiple_choice import MultipleChoice
from bert.pretrain import MaskedLanguageModel
from bert.question_answering import QuestionAnswering
from smoe.errors import run_main
from smoe.train.evaluate import evaluation_command, read_run
from smoe.train.resume import Checkpoint

_WHAT = "a BERT or RoBERTa"


def load_run(path: str | Path, which: str = "best") -> tuple[PretrainConfig, PreTrainedModel, Checkpoint]:
    """The configuration, the model (on the CPU) and the checkpoint of a run; ``which`` is ``best`` or ``last``.

    Raises ValueError when ``path`` holds no run, CheckpointError when none of its checkpoints can be read.
    """
    config, checkpoint = read_run(path, PretrainConfig, _WHAT, which)
    model = build_model(config, Vocabulary(**checkpoint.state["facts"]["vocabulary"]))
    model.load_state_dict(checkpoint.tensors["model"])
    return config, model.eval(), checkpoint


def main(argv: list[str] | None = None) -> None:
    tasks = (MaskedLanguageModel, Classification, MultipleChoice, MathWordProblems, QuestionAnswering)
    evaluation_command(*tasks, prog="python -m bert.evaluate", what=_WHAT, argv=argv)


if __name__ == "__main__":
    run_main(main)
