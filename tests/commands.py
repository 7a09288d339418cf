"""Commands of the project in processes of their own that start at once; fixtures for all tests."""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import _exit_function
from pathlib import Path

import pytest

from smoe.errors import run_main

# A server that has imported everything forks a child per command: what would take seconds of imports takes none.
SERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    "transformer_xl.train",
    "transformer_xl.classify",
    "transformer_xl.distil",
    "transformer_xl.evaluate",
    "smoe.report",
    "bert.pretrain",
    "bert.evaluate",
    "bert.multiple_choice",
    "bert.classify",
    "bert.math_word_problems",
    "bert.question_answering",
]
# What they would import at their first use.
PRELOAD += ["transformers.models.bert.modeling_bert", "transformers.models.roberta.modeling_roberta", "torch._dynamo"]
PRELOAD += ["sklearn.feature_extraction.text", "sklearn.linear_model"]
PRELOAD += ["torch.utils.flop_counter", "torch.utils.tensorboard", "matplotlib.pyplot"]
PRELOAD += ["pytest", "tests.frozen_server"]  # a server finds modules from where it starts, and passes over others
SERVER.set_forkserver_preload(PRELOAD)


def _child(
    module: str, argv: list[str], environment: dict[str, str], output: str, before: Callable[[], None] | None
) -> None:
    sys.stdout.flush()
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    os.setpgid(0, 0)
    sys.argv = [module, *argv]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if "OMP_NUM_THREADS" in environment:  # too late for OpenMP, which the server has loaded
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if before is not None:
        before()
    atexit.register(_exit_function)  # a process of multiprocessing has cleared its exit handlers
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


def start_command(
    output: str, module: str, *argv: object, env: dict[str, str] | None = None, before: Callable[[], None] | None = None
) -> Command:
    """`python -m module argv`, not waited for; it calls `before` first. What it prints is in `output`.out and .err."""
    for name in ("out", "err"):  # there even if it is killed at once
        Path(f"{output}.{name}").touch()
    process = SERVER.Process(target=_child, args=(module, [str(a) for a in argv], env or {}, output, before))
    process.start()
    return Command(process, output)


@pytest.fixture
def start(tmp_path):
    """start(module, *argv, env={}) -> Command: `python -m module argv`, not waited for."""
    commands = []

    def start(module: str, *argv: object, env: dict[str, str] | None = None) -> Command:
        output = str(tmp_path / f"command-{len(commands)}")
        commands.append(start_command(output, module, *argv, env=env))
        return commands[-1]

    yield start
    for command in commands:
        with contextlib.suppress(ProcessLookupError):
            command.process.kill()
        command.process.join()


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of a run on one machine."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


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
        port = free_port()
        ranks = [{**rank_variables(r, n, port), **(env or {}).get(r, {})} for r in range(n)]
        return [start(module, *argv, *(own or {}).get(r, ()), env=variables) for r, variables in enumerate(ranks)]

    return start_ranks


def starter(start, module: str, argv: list[object]) -> Callable[..., Command]:
    """starter(...)(run_dir, *flags, wait=True) -> Command: a training of the module with the default flags `argv`."""

    def trainer(run_dir: Path, *flags: object, wait: bool = True) -> Command:
        command = start(module, *argv, "--run_dir", run_dir, *flags)
        if wait:
            command.wait()
        return command

    return trainer


def rank_starter(start_ranks, module: str, argv: list[object]) -> Callable[..., list[Command]]:
    """rank_starter(...)(run_dir, *flags, ranks=1, own=None) -> [Command]: the same on several processes, as they start
    (`own`: see start_ranks)."""

    def trainer(run_dir: Path, *flags: object, ranks: int = 1, own: dict[int, list[object]] | None = None):
        return start_ranks(ranks, module, *argv, "--run_dir", run_dir, *flags, own=own)

    return trainer


def assert_main_refuses(main: Callable[..., object], argv: list[str], message: str, capsys) -> None:
    """`main`, in this process, ends with exit code 2 and one line on stderr that has the message."""
    with pytest.raises(SystemExit) as stop:
        run_main(main, argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def free_port() -> int:
    """A port below those that systems give to outgoing connections, one of which could take it before it is used."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port among 100 between 20000 and 32000")
