"""Bits per byte, or accuracy, of a trained Transformer-XL at any number of activated experts.

python -m transformer_xl.evaluate RUN --k 1 2 4 8 16 [--split test] [--json]
"""

from __future__ import annotations

from pathlib import Path

from smoe.errors import run_main
from smoe.train.evaluate import evaluation_command, read_run
from smoe.train.resume import Checkpoint
from transformer_xl.classify import Classification
from transformer_xl.config import LanguageModelConfig
from transformer_xl.distil import Distillation
from transformer_xl.model import TransformerXL
from transformer_xl.train import LanguageModel

_WHAT = "a Transformer-XL"


def load_run(path: str | Path, which: str = "best") -> tuple[LanguageModelConfig, TransformerXL, Checkpoint]:
    """The configuration, the model (on the CPU) and the checkpoint of a run; ``which`` is ``best`` or ``last``.

    Raises ValueError when ``path`` holds no run, CheckpointError when none of its checkpoints can be read.
    """
    config, checkpoint = read_run(path, LanguageModelConfig, _WHAT, which)
    model = config.build_model()
    model.load_state_dict(checkpoint.tensors["model"])
    return config, model, checkpoint


def main(argv: list[str] | None = None) -> None:
    tasks = (LanguageModel, Classification, Distillation)
    evaluation_command(*tasks, prog="python -m transformer_xl.evaluate", what=_WHAT, argv=argv)


if __name__ == "__main__":
    run_main(main)
