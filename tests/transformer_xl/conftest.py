"""The trainer of the Transformer-XL as a fixture."""

from pathlib import Path

import pytest
from commands import Command


@pytest.fixture
def train(start, data_dir):
    """train(method, run_dir, *flags) -> Command: the trainer at smoke scale in fp32, waited for."""

    def train(method: str, run_dir: Path, *flags: object, wait: bool = True, env=None) -> Command:
        argv = ["--method", method, "--scale", "smoke", "--data", data_dir, "--run_dir", run_dir]
        command = start("transformer_xl.train", *argv, "--precision", "fp32", "--progress", "false", *flags, env=env)
        if wait:
            command.wait()
        return command

    return train
