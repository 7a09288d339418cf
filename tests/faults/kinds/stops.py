"""A process that is killed or told to stop."""

from __future__ import annotations

import functools
import signal
import time
from pathlib import Path

from faults import injections
from faults.kinds.kind import Random, kind, strike
from faults.rig import Lost, Rig, TinyTask, assert_not_lost, ends, steps_there


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
