"""Commands of the project in processes of their own that start at once; fixtures for all tests."""

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# A server that has imported everything forks a child per command: what would take seconds of imports takes none.
_server = multiprocessing.get_context("forkserver")
PRELOAD = [
    "transformer_xl.train",
    "transformer_xl.classify",
    "transformer_xl.evaluate",
    "smoe.report",
    "bert.pretrain",
    "bert.evaluate",
    "bert.multiple_choice",
    "bert.math_word_problems",
]
# What they would import at their first use.
PRELOAD += ["transformers.models.bert.modeling_bert", "transformers.models.roberta.modeling_roberta", "torch._dynamo"]
PRELOAD += ["torch.utils.flop_counter", "torch.utils.tensorboard", "matplotlib.pyplot"]
_server.set_forkserver_preload(PRELOAD)


def _child(module: str, argv: list[str], environment: dict[str, str], output: str) -> None:
    sys.stdout.flush()
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    os.setpgid(0, 0)
    sys.argv = [module, *argv]
    if "OMP_NUM_THREADS" in environment:  # too late for OpenMP, which the server has loaded
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    from smoe.errors import run_main

    run_main(importlib.import_module(module).main)


@dataclass
class Command:
    """A running command; `wait` gives its exit code."""

    process: multiprocessing.Process
    output: str

    def wait(self, timeout: float = 240) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.err}"
        return self.process.exitcode

    def kill(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def out(self) -> str:
        return Path(f"{self.output}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.output}.err").read_text()


@pytest.fixture
def start(tmp_path):
    """start(module, *argv, env={}) -> Command: `python -m module argv`, not waited for."""
    commands = []

    def start(module: str, *argv: object, env: dict[str, str] | None = None) -> Command:
        output = str(tmp_path / f"command-{len(commands)}")
        process = _server.Process(target=_child, args=(module, [str(a) for a in argv], env or {}, output))
        process.start()
        commands.append(Command(process, output))
        return commands[-1]

    yield start
    for command in commands:
        with contextlib.suppress(ProcessLookupError):
            command.process.kill()
        command.process.join()


@pytest.fixture
def start_ranks(start):
    """start_ranks(n, module, *argv, own={rank: flags}, env={rank: variables}) -> [Command]: n processes of a run, as
    torchrun starts them."""

    def start_ranks(
        n: int,
        module: str,
        *argv: object,
        own: dict[int, list[object]] | None = None,
        env: dict[int, dict[str, str]] | None = None,
    ) -> list[Command]:
        common = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{**common, "RANK": str(r), "LOCAL_RANK": str(r), **(env or {}).get(r, {})} for r in range(n)]
        return [start(module, *argv, *(own or {}).get(r, ()), env=variables) for r, variables in enumerate(ranks)]

    return start_ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
