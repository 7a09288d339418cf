"""The trainer of the Transformer-XL as a fixture."""

from pathlib import Path

import pytest
from commands import Command


@pytest.fixture
def train_argv(data_dir):
    """Flags of the trainer at smoke scale in fp32."""
    return ["--scale", "smoke", "--data", data_dir, "--precision", "fp32", "--progress", "false"]


@pytest.fixture
def train(start, train_argv):
    """train(method, run_dir, *flags) -> Command: the trainer, waited for."""

    def train(method: str, run_dir: Path, *flags: object, wait: bool = True) -> Command:
        command = start("transformer_xl.train", *train_argv, "--method", method, "--run_dir", run_dir, *flags)
        if wait:
            command.wait()
        return command

    return train
