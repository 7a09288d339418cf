"""A Transformer-XL run with fewer experts, as a run folder of its own.

python -m transformer_xl.slim RUN --keep 8 --out DIR [--data DIR] [--score count|weight|reap] [--k K] [--batches 64]
"""

from __future__ import annotations

from collections.abc import Sequence

from smoe.errors import run_main
from smoe.train.slim_run import slim_command
from transformer_xl.classify import Classification
from transformer_xl.train import LanguageModel


def main(argv: Sequence[str] | None = None) -> None:
    tasks = (LanguageModel, Classification)
    slim_command(*tasks, prog="python -m transformer_xl.slim", what="a Transformer-XL", argv=argv)


if __name__ == "__main__":
    run_main(main)
