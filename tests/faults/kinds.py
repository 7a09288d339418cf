"""Every kind of fault: what is done to a run, and what must hold then.

A kind is `kind(rig, task, random)` for one of the tasks that it is for; it raises Lost, Hang or Unclear.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random as random_module
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mirror
from commands import Command, free_port, rank_variables
from faults import injections
from faults.rig import (
    DEADLINE,
    HALF,
    SAVE,
    Hang,
    Lost,
    Rig,
    TinyTask,
    Unclear,
    assert_not_lost,
    can_mount,
    ends,
    newest,
    reached,
    small_disk,
    steps_there,
)
from runs import result, wait_for_step

from data.errors import DownloadError
from data.fetch import Url, first_that_works
from data.folder import scratch
from smoe.files import lock_file

ROOT = Path(__file__).parents[2]
Random = random_module.Random
ALL = ("language_model", "masked_lm", "classification", "multiple_choice", "math_word_problems", "question_answering")
MAPPED = ("language_model", "masked_lm")
DAMAGES = ("truncated", "bit-flipped", "empty", "missing", "exchanged")


@dataclass(frozen=True)
class Kind:
    """`share`: of how many in a hundred faults. `tasks`: which it is done to, in turn."""

    name: str
    title: str
    share: int
    tasks: tuple[str, ...]
    run: Callable[[Rig, TinyTask, Random], None]


KINDS: dict[str, Kind] = {}


def kind(name: str, title: str, share: int, tasks: tuple[str, ...] = ALL) -> Callable:
    def add(function: Callable[[Rig, TinyTask, Random], None]) -> Callable[[Rig, TinyTask, Random], None]:
        KINDS[name] = Kind(name, title, share, tasks, function)
        return function

    return add


def strike(command: Command, number: int) -> None:
    """Sends the signal, if the process has not just ended."""
    with contextlib.suppress(ProcessLookupError):
        command.kill(number)


# ---- the process ends ------------------------------------------------------------------------------------------------
def start_somewhere(rig: Rig, task: TinyTask, random: Random, **how: object):
    """A run from its beginning or from its middle, and how long it may take."""
    run = rig.half(task) if random.random() < 0.4 else rig.folder() / "run"
    rig.alone(task.name)
    return run, rig.start(task, run, **how), rig.seconds[task.name]


@kind("kill", "SIGKILL at a random moment", 12)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run, command, seconds = start_somewhere(rig, task, random)
    time.sleep(random.random() * seconds)
    before = steps_there(run)
    strike(command, signal.SIGKILL)
    ends(command, -signal.SIGKILL, 0)
    rig.goes_on(task, run, None if (run / "result.json").exists() else assert_not_lost(run, before))
    no_leftovers(run)


@kind("kill-save", "SIGKILL while a checkpoint is written", 14)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run = rig.folder() / "run"
    command = rig.start(task, run, before=functools.partial(injections.killed_while_saving, random.randint(1, 200)))
    ends(command, -signal.SIGKILL, 0)
    rig.goes_on(task, run, None if (run / "result.json").exists() else assert_not_lost(run, steps_there(run)))
    no_leftovers(run)


def no_leftovers(run: Path) -> None:
    """A finished run holds what it should: the newest two checkpoints and the best ones, nothing half-written."""
    left = [path for path in run.rglob("*") if ".tmp-" in path.name]
    if left or not len(steps_there(run)) <= 3:
        raise Lost(f"left behind: {left} {steps_there(run)}")


def signalled(rig: Rig, task: TinyTask, random: Random, number: int) -> None:
    run, command, seconds = start_somewhere(rig, task, random)
    rig.until_begun(command)
    time.sleep(random.random() * seconds)
    before = steps_there(run)
    if command.process.is_alive():
        strike(command, number)
    # In its loop a training writes a checkpoint; while it starts or sweeps, it just ends, and nothing is lost.
    code = ends(command, 75, 0, 130 if number == signal.SIGINT else -number)
    step = assert_not_lost(run, before)
    if code == 75 and f"stopped by a signal after step {step};" not in command.err:
        raise Lost(f"the newest checkpoint is {step}, not the one just written: {command.err}")
    rig.goes_on(task, run, None if (run / "result.json").exists() else step)


kind("sigterm", "SIGTERM at a random moment", 6)(functools.partial(signalled, number=signal.SIGTERM))
kind("sigint", "SIGINT at a random moment", 6)(functools.partial(signalled, number=signal.SIGINT))


# ---- the disk --------------------------------------------------------------------------------------------------------
def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@kind("disk-full", "a disk that fills", 8)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    alone = rig.alone(task.name)
    folder = rig.folder()
    if not can_mount(folder / "probe"):
        return file_limit(rig, task, random)
    size = random.randint(4096, int(1.3 * size_of(alone)))
    with small_disk(folder, size) as enlarge:
        command = rig.start(task, folder / "run")
        code = ends(command, 1, 0)
        step = assert_not_lost(folder / "run", steps_there(folder / "run"))
        enlarge()
        rig.goes_on(task, folder / "run", None if code == 0 else step)


@kind("file-limit", "a quota: no file may grow beyond a size", 4)
def file_limit(rig: Rig, task: TinyTask, random: Random) -> None:
    alone = rig.alone(task.name)
    largest = max(path.stat().st_size for path in alone.rglob("*") if path.is_file())
    run = rig.half(task)
    before = steps_there(run)
    limit = functools.partial(injections.files_limited_to, random.randint(200, largest))
    ends(rig.start(task, run, before=limit), 1, 0)
    rig.goes_on(task, run, None if (run / "result.json").exists() else assert_not_lost(run, before))


@kind("read-only", "a run folder made read-only", 4)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run = rig.half(task)
    before, inside = steps_there(run), random.random() < 0.5
    locked = run / "checkpoints" if inside else run
    if os.geteuid() != 0:
        lock, unlock = (lambda: locked.chmod(0o555)), (lambda: locked.chmod(0o755))
    else:  # whom permissions do not stop
        lock, unlock = (lambda flag=flag: subprocess.run(["chattr", flag, locked], check=True) for flag in ("+i", "-i"))
    command = None
    if random.random() < 0.5:  # while it runs
        command = rig.start(task, run)
        rig.until_step(run, random.randint(HALF, rig.steps - 2), command)
    lock()
    try:
        ends(command or rig.start(task, run), 1, 2, 0)
    finally:
        unlock()
    rig.goes_on(task, run, None if (run / "result.json").exists() else assert_not_lost(run, before))


@kind("folder-gone", "a run folder removed, renamed or replaced while it runs", 6)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run, how = rig.folder() / "run", random.choice(("removed", "renamed", "replaced"))
    other = rig.half(task) if how == "replaced" else None
    command = rig.start(task, run)
    rig.until_step(run, random.randint(1, rig.steps - 1), command)
    aside = run.with_name("aside")
    run.rename(aside)
    if other is not None:
        other.rename(run)
        there = tree(run)
    # A moment before it ends, there is nothing left to write.
    code = ends(command, 1, 0)
    if how == "replaced" and tree(run) != there:
        raise Lost("it wrote into the folder that took its own one's place")
    if how != "replaced" and run.exists():
        raise Lost(f"it made the folder anew, with {[path.name for path in run.iterdir()]}")
    if how == "removed":
        return
    shutil.rmtree(run, ignore_errors=True)
    aside.rename(run)
    rig.goes_on(task, run, None if code == 0 or (run / "result.json").exists() else newest(run))


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but TensorBoard's, which opens its own by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "tensorboard")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- files -----------------------------------------------------------------------------------------------------------
def damage(file: Path, how: str, random: Random, other: Path | None = None) -> None:
    """`other`: the file that it is exchanged with."""
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "exchanged" and other is not None and other.exists() and other.read_bytes() != content:
        file.write_bytes(other.read_bytes())
    elif how == "truncated" and len(content) > 1:
        file.write_bytes(content[: random.randrange(1, len(content))])
    elif how in ("bit-flipped", "exchanged") and content:
        place = random.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :])
    else:
        file.write_bytes(b"" if content else b"\0")


_turns: dict[str, int] = {}


def in_turn(name: str, *choices: tuple) -> tuple:
    """All combinations of the choices, one after the other."""
    turn = _turns[name] = _turns.get(name, -1) + 1
    picked = []
    for options in choices:
        turn, index = divmod(turn, len(options))
        picked.append(options[index])
    return tuple(picked)


@kind("checkpoint-file", "a file of the newest checkpoint damaged", 17)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run = rig.half(task)
    newer, older = (run / "checkpoints" / f"step-{step:08d}" for step in reversed(steps_there(run)[-2:]))
    name, how = in_turn(f"checkpoint-{task.name}", tuple(path.name for path in sorted(newer.iterdir())), DAMAGES)
    damage(newer / name, how, random, older / name)
    command = rig.start(task, run)
    ends(command, 0)
    if f"warning: {newer.name} is damaged" not in command.err:
        raise Lost(f"{name} {how}: not noticed")
    if f"resumed after step {int(older.name[5:])}\n" not in command.out:
        raise Lost(f"{name} {how}: it does not go on from {older.name}: {command.out}")
    rig.is_as_alone(task, run)


@kind("all-checkpoints", "all checkpoints damaged, gone, or another run's", 3)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run, (how,) = rig.half(task), in_turn(f"all-{task.name}", ("damaged", "gone", "of another run"))
    kept = run.with_name("kept")
    shutil.copytree(run / "checkpoints", kept)
    if how == "damaged":
        for step in steps_there(run):
            names = sorted((run / "checkpoints" / f"step-{step:08d}").iterdir())
            damage(random.choice(names), random.choice(DAMAGES[:4]), random)
    else:
        shutil.rmtree(run / "checkpoints")
    if how == "of another run":
        shutil.copytree(rig.alone(task.name, "--seed", 2) / "checkpoints", run / "checkpoints")
    ends(rig.start(task, run), 1 if how == "damaged" else 2)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    kept.rename(run / "checkpoints")
    rig.goes_on(task, run, newest(run))


@kind("run-file", "a file of the run folder damaged", 10)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    names = ("config.yaml", "metrics.jsonl", ".training.lock", "tensorboard", "result.json")
    name, how = in_turn(f"run-{task.name}", names, DAMAGES)
    finished = name == "result.json"
    run = rig.half(task)
    if finished:
        shutil.rmtree(run)
        shutil.copytree(rig.alone(task.name), run)
    file = next((run / name).iterdir()) if name == "tensorboard" else run / name
    whole, before = file.read_bytes(), assert_not_lost(run, [])
    damage(file, how, random, rig.alone(ALL[ALL.index(task.name) - 1]) / name)
    code = ends(rig.start(task, run), 0, 1, 2)
    if code or finished:
        if newest(run) != before:
            raise Lost(f"{name} {how}: the newest checkpoint is {newest(run)}, it was {before}")
        file.unlink(missing_ok=True)
        if not finished:
            file.write_bytes(whole)
        rig.goes_on(task, run, before)
    else:
        rig.is_as_alone(task, run, whole_log=name != "metrics.jsonl")


@kind("data-shrinks", "a data file that shrinks under its memory map", 5, MAPPED)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run = rig.folder() / "run"
    data = run.with_name("data")
    shutil.copytree(task.data, data)
    file = data / random.choice((task.mapped, task.mapped.replace("train", "valid")))
    whole = file.read_bytes()
    command = rig.start(task, run, data=data)
    rig.until_step(run, random.randint(1, rig.steps - 1), command)
    os.truncate(file, random.choice((0, random.randrange(len(whole)), len(whole) - 1)))
    code = ends(command, 1, 0)
    if code and "has shrunk" not in command.err:
        raise Unclear(command.err)
    step = newest(run)
    if not (run / "result.json").exists():
        ends(rig.start(task, run, data=data), 2, words=file.name)
    file.write_bytes(whole)
    rig.goes_on(task, run, None if (run / "result.json").exists() else step)


# ---- numbers ---------------------------------------------------------------------------------------------------------
@kind("not-finite", "a loss or a gradient made NaN or infinite", 6)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run, step = rig.folder() / "run", random.randrange(rig.steps)
    what, value = random.choice(("loss", "gradient")), random.choice((float("nan"), float("inf"), float("-inf")))
    command = rig.start(task, run, before=functools.partial(injections.not_finite, (step,), value, what))
    ends(command, 1, words=f"not finite at step {step + 1}")
    saved = step // SAVE * SAVE
    if newest(run) != (saved or None):
        raise Lost(f"the newest checkpoint is {newest(run)}, expected {saved}")
    rig.goes_on(task, run, saved or None)


@kind("skipped", "steps with NaN left out (--skip_nonfinite), and a SIGKILL", 4)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    steps, what = tuple(sorted(random.sample(range(rig.steps), 2))), random.choice(("loss", "gradient"))
    spoil = functools.partial(injections.not_finite, steps, float("nan"), what)
    flags = ("--skip_nonfinite", 2)
    alone, run = rig.folder() / "run", rig.folder() / "run"
    ends(rig.start(task, alone, *flags, before=spoil), 0)
    command = rig.start(task, run, *flags, before=spoil)
    rig.until_step(run, random.randint(1, rig.steps - 1), command)
    strike(command, signal.SIGKILL)
    ends(command, -signal.SIGKILL, 0)
    ends(rig.start(task, run, *flags, before=spoil), 0)
    counted = [result(folder)["skipped_steps"] for folder in (alone, run)]
    if counted != [2, 2]:
        raise Lost(f"steps counted as left out: {counted}")
    Rig.is_as(alone, run)
    third = rig.folder() / "run"
    ends(rig.start(task, third, "--skip_nonfinite", 1, before=spoil), 1, words=f"not finite at step {steps[1] + 1}")


# ---- several processes -----------------------------------------------------------------------------------------------
def start_ranks(rig: Rig, task: TinyTask, run: Path, *flags: object) -> list:
    port = free_port()
    return [rig.start(task, run, *flags, env=rank_variables(rank, 2, port)) for rank in range(2)]


def two_alone(rig: Rig, name: str) -> Path:
    def make() -> Path:
        run = rig.folder() / "run"
        for command in start_ranks(rig, rig.tasks[name], run):
            ends(command, 0)
        return run

    return rig.once(("two", name), make)


def lose_a_rank(rig: Rig, task: TinyTask, random: Random, number: int) -> None:
    alone, run = two_alone(rig, task.name), rig.folder() / "run"
    timeout = ("--process_timeout", 4)
    commands = start_ranks(rig, task, run, *timeout)
    rig.until_step(run, random.randint(1, rig.steps - 4), commands[0])
    before, victim = steps_there(run), random.randrange(2)
    strike(commands[victim], number)
    ends(commands[1 - victim], 1, words="lost contact with another process")
    if number == signal.SIGSTOP:  # woken up, it finds itself alone
        strike(commands[victim], signal.SIGCONT)
        ends(commands[victim], 1)
    commands[victim].process.join(DEADLINE)
    step = assert_not_lost(run, before)
    commands = start_ranks(rig, task, run)
    for command in commands:
        ends(command, 0)
    if step is not None and f"resumed after step {step}\n" not in commands[0].out:
        raise Lost(commands[0].out)
    Rig.is_as(alone, run)


kind("rank-dies", "a process of two dies", 3)(functools.partial(lose_a_rank, number=signal.SIGKILL))
kind("rank-hangs", "a process of two hangs", 3)(functools.partial(lose_a_rank, number=signal.SIGSTOP))


def wait_until_free(run: Path) -> None:
    """Returns once no process holds the run folder."""
    deadline = time.monotonic() + DEADLINE
    while True:
        with contextlib.suppress(ValueError):
            os.close(lock_file(run / ".training.lock"))
            return
        if time.monotonic() > deadline:
            raise Hang(f"{run} is still in use")
        time.sleep(0.05)


@kind("torchrun", "SIGTERM, SIGINT or SIGKILL to script/launch.py with two processes", 2, MAPPED)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run = rig.folder() / "run"
    launch = [sys.executable, "script/launch.py", "--nproc_per_node", 2, "--max_restarts", 1]
    launch += ["--standalone", "-m", task.module]
    command = [str(word) for word in (*launch, *rig.flags(task, run), "--steps", 4000)]
    log = run.with_name("log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=file, stdout=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        wait_for_step(run, 5, lambda: process.poll() is None, 3 * DEADLINE)  # three interpreters start first
        (number,) = in_turn("torchrun", (signal.SIGTERM, signal.SIGKILL, signal.SIGINT))
        process.send_signal(number)
        code = process.wait(DEADLINE)
        if number == signal.SIGKILL:  # its workers find out themselves
            wait_until_free(run)
    except subprocess.TimeoutExpired:
        raise Hang(log.read_text()) from None
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    expected = (-number, 0) if number == signal.SIGKILL else (75, 1)
    if (code, said.count("error: ")) != expected or "Traceback" in said or "a checkpoint is written" not in said:
        raise Unclear(f"exit code {code}: {said}")
    if newest(run) is None or newest(run) < reached(run):
        raise Lost(f"the newest checkpoint is {newest(run)}, it came to step {reached(run)}")


@kind("two-at-once", "two processes started on one run folder", 5)
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    run = rig.folder() / "run"
    first = rig.start(task, run)
    rig.until_step(run, random.randint(1, rig.steps // 2), first)
    second = rig.start(task, run)
    if ends(second, 2, 0) == 0 and "is finished" not in second.out:
        raise Lost("a second process was let in")
    if random.random() < 0.5:
        ends(first, 0)
        rig.is_as_alone(task, run)
        ends(rig.start(task, run), 0)
    else:  # free at once when its holder is gone
        strike(first, signal.SIGKILL)
        ends(first, -signal.SIGKILL, 0)
        rig.goes_on(task, run)


# ---- downloads -------------------------------------------------------------------------------------------------------
CONTENT = bytes(range(256)) * 400
ANSWERS = ("cut", "web page", "nothing", "an error", "killed half-way")


@kind("download", "a download cut off, a web page, nothing, a kill half-way", 4, ("language_model",))
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    out, (how,) = rig.folder() / "out", in_turn("download", ANSWERS)
    cut = random.randrange(1, len(CONTENT))

    def answer(request) -> None:
        request.close_connection = True
        bad = request.path == "/bad"
        if bad and how == "nothing":
            return
        request.send_response(503 if bad and how == "an error" else 200)
        if not bad or how != "web page":
            request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(b"<html>Sign in</html>" if bad and how == "web page" else CONTENT[:cut] if bad else CONTENT)
        request.wfile.flush()
        if bad and how == "killed half-way":
            time.sleep(2)

    def take(path: Path) -> bytes:
        return path.read_bytes()

    with mirror.serve(answer) as url:
        bad, good = (Url(f"{url}/{name}", len(CONTENT), timeout=20) for name in ("bad", "good"))
        if how == "killed half-way":
            code = "from pathlib import Path; from data.fetch import *; from data.folder import scratch\n"
            code += f"with scratch(Path({str(out)!r})) as own: first_that_works([{bad!r}], Path.read_bytes, own)"
            child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
            deadline = time.monotonic() + DEADLINE
            while not (list(out.glob("*/*/download")) if out.exists() else []) and time.monotonic() < deadline:
                time.sleep(0.01)
            child.kill()
            child.wait()
        else:
            try:
                with scratch(out) as own:
                    first_that_works([bad], take, own)
                raise Lost(f"{how}: it was taken for whole")
            except DownloadError as error:
                if "\n" in str(error):
                    raise Unclear(str(error)) from None
        with scratch(out) as own:  # as data sets are fetched
            content, name = first_that_works([bad, good] if how != "killed half-way" else [good], take, own)
        if content != CONTENT or name != good.url or list(out.iterdir()):
            raise Lost(f"{how}: {len(content)} bytes from {name}; left {list(out.iterdir())}")
