"""The trainer of the Transformer-XL as a fixture."""

from pathlib import Path

import pytest
from commands import Command, starter


@pytest.fixture
def train_argv(data_dir):
    """Flags of the trainer at smoke scale in fp32."""
    return ["--scale", "smoke", "--data", data_dir, "--precision", "fp32", "--progress", "false"]


@pytest.fixture
def train(start, train_argv):
    """train(method, run_dir, *flags, wait=True) -> Command: the trainer, waited for."""
    trainer = starter(start, "transformer_xl.train", train_argv)

    def train(method: str, run_dir: Path, *flags: object, wait: bool = True) -> Command:
        return trainer(run_dir, "--method", method, *flags, wait=wait)

    return train
