"""Prepared data of synthetic stories, and the trainer's commands in processes of their own that start at once."""

import contextlib
import importlib
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRELOAD = ["bert.pretrain", "bert.evaluate"]
# What they would import at their first use.
PRELOAD += ["transformers.models.bert.modeling_bert", "transformers.models.roberta.modeling_roberta", "torch._dynamo"]
PRELOAD += ["torch.utils.flop_counter", "torch.utils.tensorboard", "transformers.trainer"]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def stories(count: int, seed: int = 0, words: int = 1500) -> list[str]:
    """Texts of paragraphs with sentences, each of words of its own besides the common ones."""
    import numpy as np

    rng = np.random.default_rng(seed)
    common = ["".join(map(chr, rng.integers(97, 123, size=rng.integers(2, 7)))) for _ in range(60)]
    texts = []
    for number in range(count):
        text = " ".join(
            (common[i].capitalize() + "." if n % 9 == 8 else common[i])
            for n, i in enumerate(rng.integers(0, len(common), size=words))
        )
        texts.append(f"Story {number}.\n\n" + text.replace(". ", ".\n\n"))
    return texts


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """prepared(model) -> a folder of data/bookcorpus/prepare.py: ten stories, blocks of 64 tokens."""
    spec = importlib.util.spec_from_file_location("bookcorpus_prepare", ROOT / "data/bookcorpus/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = tmp_path_factory.mktemp("stories")
    for number, text in enumerate(stories(10)):
        (source / f"{number}.txt").write_text(text)
    folders = {}

    def prepared(model: str) -> Path:
        if model not in folders:
            out = tmp_path_factory.mktemp(model)
            flags = ["--model", model, "--scale", "smoke", "--source", source, "--out", out]
            flags += ["--vocab_size", 300, "--block_length", 64]
            assert module.main([str(flag) for flag in flags]) == 0
            folders[model] = out
        return folders[model]

    return prepared


# A server that has imported everything forks a child per command: what would take seconds of imports takes none.
_server = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session")
def _preload():
    # There is one server for the whole session: what others want it to import must stay.
    there = multiprocessing.forkserver._forkserver._preload_modules
    _server.set_forkserver_preload([*there, *PRELOAD])


def _child(module: str, argv: list[str], environment: dict[str, str], output: str) -> None:
    sys.stdout.flush()
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    os.setpgid(0, 0)
    sys.argv = [module, *argv]
    from smoe.run.errors import run_main

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
def start(tmp_path, _preload):
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
def pretrain(start, prepared):
    """pretrain(model, method, run_dir, *flags) -> Command: the trainer at smoke scale in fp32, waited for.

    The sweep has two k: counting FLOPs takes most of such a run's time.
    """

    def pretrain(model: str, method: str, run_dir: Path, *flags: object, wait: bool = True, env=None) -> Command:
        argv = ["--model", model, "--method", method, "--scale", "smoke", "--run_dir", run_dir]
        argv += ["--data", prepared(model), "--precision", "fp32", "--progress", "false"]
        argv += ["--sweep", "[1,16]"]
        command = start("bert.pretrain", *argv, *flags, env=env)
        if wait:
            command.wait()
        return command

    return pretrain


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
