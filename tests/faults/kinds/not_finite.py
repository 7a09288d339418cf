"""Losses and gradients that are NaN or infinite."""

from __future__ import annotations

import functools
import signal

from faults import injections
from faults.kinds.kind import Random, kind, strike
from faults.rig import SAVE, Lost, Rig, TinyTask, ends, newest
from runs import result


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
