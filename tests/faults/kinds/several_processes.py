"""Ranks that die or hang, a launcher that is stopped, and two runs on one folder."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from commands import free_port, rank_variables
from faults.kinds.kind import MAPPED, ROOT, Random, in_turn, kind, strike
from faults.rig import DEADLINE, Hang, Lost, Rig, TinyTask, Unclear, assert_not_lost, ends, newest, reached, steps_there
from runs import wait_for_step

from smoe.files import lock_file


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


# A BERT first: it is what the suite's drill takes, and the Transformer-XL has such a test of its own.
@kind("torchrun", "SIGTERM, SIGINT or SIGKILL to script/launch.py with two processes", 2, MAPPED[::-1])
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
