"""Tiny trainings of every kind of task, and what must hold when something happens to them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fine_tuning
from books import write_books
from commands import Command, start_command
from example_data import write_sentences, write_words
from faults import injections
from interruptions import assert_same_run
from runs import assert_same_weights, losses, wait_for_step

from smoe.errors import CheckpointError
from smoe.train.checkpoint import list_steps
from smoe.train.resume import load_latest

STEPS, SAVE, EVALUATE, HALF = 24, 3, 12, 17
DEADLINE = 90.0  # seconds, of a command that takes about two
SIGNALS = {-number: number.name for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)}


class Lost(AssertionError):
    """A checkpoint, or bits of the result, are gone."""


class Hang(AssertionError):
    """A command went on after its deadline."""


class Unclear(AssertionError):
    """A failure that is not one clear line and a non-zero exit code."""


@dataclass(frozen=True)
class TinyTask:
    """One kind of training: the module that is run, its flags, and the file of its data that is memory-mapped."""

    name: str
    module: str
    argv: tuple[object, ...]
    data: Path
    mapped: str | None = None


def make_tasks(root: Path) -> dict[str, TinyTask]:
    """Data and flags of all kinds of tasks; what they need is written below `root`."""
    (root / "source").mkdir(parents=True)
    words, books = write_words(root / "words"), write_books("bert", root / "source", root / "books")
    sentences = write_sentences(root / "sst2", {"train": 90, "valid": 23})
    questions, problems, paragraphs = (root / name for name in ("csqa", "mawps", "hotpotqa"))
    fine_tuning.write_questions(questions), fine_tuning.write_problems(problems)
    fine_tuning.write_paragraphs(paragraphs)
    bert = ("--model", "bert", "--tokenizer", fine_tuning.tokenizer("bert", root))
    tasks = [
        TinyTask("language_model", "transformer_xl.train", ("--method", "smoe_dropout"), words, "train.bin"),
        TinyTask("masked_lm", "bert.pretrain", ("--method", "smoe_dropout", "--model", "bert"), books, "train.bin"),
        TinyTask("classification", "transformer_xl.classify", ("--method", "smoe_dropout"), sentences),
        TinyTask("multiple_choice", "bert.multiple_choice", ("--method", "smoe_dropout", *bert), questions),
        TinyTask("math_word_problems", "bert.math_word_problems", ("--method", "thor", *bert), problems),
        TinyTask("question_answering", "bert.question_answering", ("--method", "smoe_dropout", *bert), paragraphs),
    ]
    return {task.name: task for task in tasks}


class Rig:
    """Starts the tasks in folders below `root`, and compares them with runs that nothing has happened to."""

    def __init__(self, root: Path, steps: int = STEPS) -> None:
        self.root, self.steps = root, steps
        self.tasks = make_tasks(root / "data")
        self.seconds: dict[str, float] = {}  # of an undisturbed run
        self._count = itertools.count()
        self._made: dict[tuple, Path] = {}
        self._lock = threading.RLock()
        self._of_trial = threading.local()  # trials run side by side, each in a thread

    def _mine(self) -> threading.local:
        if not hasattr(self._of_trial, "commands"):
            self._of_trial.commands, self._of_trial.folders = [], []
        return self._of_trial

    def folder(self) -> Path:
        """A new folder for a trial; the run is in `run` in it."""
        folder = self.root / f"trial-{next(self._count)}"
        folder.mkdir()
        self._mine().folders.append(folder)
        return folder

    def flags(self, task: TinyTask, run: Path, data: Path | None = None) -> list[object]:
        flags = ["--scale", "smoke", "--data", data or task.data, "--run_dir", run, "--precision", "fp32"]
        flags += ["--progress", "false", "--sweep", "1,16", "--steps", self.steps, "--log_interval", 1]
        return [*task.argv, *flags, "--save_interval", SAVE, "--eval_interval", EVALUATE, "--resume"]

    def start(
        self,
        task: TinyTask,
        run: Path,
        *flags: object,
        data: Path | None = None,
        before: Callable[[], None] | None = None,
        env: dict[str, str] | None = None,
    ) -> Command:
        output = str(self.root / f"command-{next(self._count)}")
        argv = [*self.flags(task, run, data), *flags]
        before = functools.partial(injections.start, before, Path(f"{output}.begun"))
        command = start_command(output, task.module, *argv, before=before, env={"OMP_NUM_THREADS": "1"} | (env or {}))
        self._mine().commands.append(command)
        return command

    def until_begun(self, command: Command) -> None:
        """Returns once the command is past the start of Python itself."""
        deadline = time.monotonic() + DEADLINE
        while not Path(f"{command.output}.begun").exists() and command.process.is_alive():
            if time.monotonic() > deadline:
                raise Hang("it has not begun")
            time.sleep(0.002)

    def once(self, key: tuple, make: Callable[[], Path]) -> Path:
        """The run that `make` makes, made once and kept, for trials to compare with or to copy."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
                self._mine().folders.remove(self._made[key].parent)
            return self._made[key]

    def alone(self, name: str, *flags: object) -> Path:
        """A run of the task that nothing happens to."""
        return self.once(("alone", name, *flags), lambda: self._alone(name, *flags))

    def _alone(self, name: str, *flags: object) -> Path:
        run, started = self.folder() / "run", time.monotonic()
        ends(self.start(self.tasks[name], run, *flags), 0)
        self.seconds[name] = time.monotonic() - started
        return run

    def _half(self, name: str) -> Path:
        run = self.folder() / "run"
        command = self.start(self.tasks[name], run)
        wait_for_step(run, HALF, command.process.is_alive)
        command.kill(signal.SIGKILL)
        command.wait()
        return run

    def half(self, task: TinyTask) -> Path:
        """A copy of a run of the task that was killed in the middle, with two checkpoints and more."""
        run = self.folder() / "run"
        shutil.copytree(self.once(("half", task.name), lambda: self._half(task.name)), run)
        return run

    def goes_on(self, task: TinyTask, run: Path, newest: int | None = None, whole_log: bool = True) -> None:
        """Started again, the run goes on from the checkpoint `newest` (None: wherever), and ends as one that nothing
        has happened to, to the bit."""
        command = self.start(task, run)
        ends(command, 0)
        if newest is not None and f"resumed after step {newest}\n" not in command.out:
            raise Lost(f"it does not go on from step {newest}: {command.out} {command.err}")
        self.is_as_alone(task, run, whole_log)

    def is_as_alone(self, task: TinyTask, run: Path, whole_log: bool = True) -> None:
        self.is_as(self.alone(task.name), run, whole_log)

    @staticmethod
    def is_as(alone: Path, run: Path, whole_log: bool = True) -> None:
        """Both runs have the same bits: final weights, and, with `whole_log`, every loss and metric."""
        try:
            (assert_same_run if whole_log else assert_same_weights)(alone, run)
        except (AssertionError, OSError, IndexError) as error:
            raise Lost(f"not the undisturbed run's bits: {error!r:.300}") from None

    def until_step(self, run: Path, step: int, command: Command) -> None:
        wait_for_step(run, step, lambda: command.process.is_alive() or reached(run) >= step, DEADLINE)

    def end_trial(self) -> None:
        """Ends what this thread's trial has started, and removes its folders."""
        mine = self._mine()
        for command in mine.commands:
            with contextlib.suppress(ProcessLookupError, ValueError):
                command.process.kill()
                command.process.join()
        for folder in mine.folders:
            shutil.rmtree(folder, ignore_errors=True)
        mine.commands.clear(), mine.folders.clear()


def ends(command: Command, *codes: int, words: str = "") -> int:
    """The command's exit code, one of `codes`, after one clear line if it is a failure. `words` are in that line."""
    command.process.join(DEADLINE)
    code = command.process.exitcode
    if code is None:
        raise Hang(f"still running after {DEADLINE:.0f} s: {command.out} {command.err}")
    said = [line for line in command.err.splitlines() if not line.startswith(("warning: ", "no checkpoint in "))]
    shown = f"exit code {code}, expected {' or '.join(map(str, codes))}; stderr: {command.err[:1500]!r}"
    if code not in codes or "Traceback" in command.err:
        raise Unclear(shown)
    one_line = len(said) == 1 and said[0].startswith("error: ") and words in said[0]
    if not (one_line if code > 0 else not said):
        raise Unclear(shown)
    return code


def newest(run: Path) -> int | None:
    """The step of the newest checkpoint that is whole."""
    try:
        latest = load_latest(run / "checkpoints", groups=[])
    except CheckpointError:
        return None
    return None if latest is None else latest.step


def steps_there(run: Path) -> list[int]:
    return list_steps(run / "checkpoints")


def reached(run: Path) -> int:
    """The last step in metrics.jsonl; 0 before the first."""
    return max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0


def assert_not_lost(run: Path, before: list[int]) -> int | None:
    """The newest whole checkpoint, which is not older than the newest one that was there before."""
    now = newest(run)
    if before and (now is None or now < before[-1]):
        raise Lost(f"checkpoint {before[-1]} was there; now the newest whole one is {now}")
    return now


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A file system of so many bytes on `folder`; what is yielded makes it large."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs here."""
    folder.mkdir()
    try:
        with small_disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
