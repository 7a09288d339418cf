"""The trainer of BERT and RoBERTa as a fixture."""

import os
from pathlib import Path

import pytest
from commands import Command, starter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def pretrain_argv(prepared):
    """pretrain_argv(model) -> flags of the trainer at smoke scale in fp32.

    The sweep has two k, to be short.
    """

    def pretrain_argv(model: str) -> list[object]:
        argv = ["--model", model, "--scale", "smoke", "--data", prepared(model), "--precision", "fp32"]
        return [*argv, "--progress", "false", "--sweep", "[1,16]"]

    return pretrain_argv


@pytest.fixture
def pretrain(start, pretrain_argv):
    """pretrain(model, method, run_dir, *flags, wait=True) -> Command: the trainer, waited for."""

    def pretrain(model: str, method: str, run_dir: Path, *flags: object, wait: bool = True) -> Command:
        trainer = starter(start, "bert.pretrain", pretrain_argv(model))
        return trainer(run_dir, "--method", method, *flags, wait=wait)

    return pretrain
