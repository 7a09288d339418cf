"""One training per kind of task, killed many times at random moments and resumed each time."""

from __future__ import annotations

import random as random_module
import signal
import sys
import time
from pathlib import Path

from faults.rig import Lost, Rig, assert_not_lost, ends, newest, reached, steps_there

TASKS = ("language_model", "masked_lm", "classification")
# A run goes on for this many steps between two kills, on the average.
STEPS_EACH = 5


def run_kills(root: Path, kills: int, seed: int) -> dict:
    """Per task: how often it was killed, between which steps, and whether it ends with the undisturbed run's bits."""
    rig, rows = Rig(root, steps=kills * STEPS_EACH), []
    try:
        for name in TASKS:
            rows.append(kill_often(rig, name, kills, random_module.Random(f"{seed}/{name}")))
    finally:
        rig.end_trial()
    return {"kills": kills, "seed": seed, "steps": rig.steps, "tasks": rows}


def kill_often(rig: Rig, name: str, kills: int, random: random_module.Random) -> dict:
    task, started = rig.tasks[name], time.monotonic()
    rig.alone(name)
    run, killed, in_save, lost = rig.folder() / "run", 0, 0, None
    while killed < kills:
        command = rig.start(task, run)
        # A moment drawn anew each time: while it starts, in a step, in a save. It comes a few steps further.
        goal = reached(run) + random.randint(0, 2 * STEPS_EACH - 1)
        deadline = time.monotonic() + 60
        while reached(run) < min(goal, rig.steps - 1) and command.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        before = steps_there(run)
        command.kill(signal.SIGKILL)
        if ends(command, -signal.SIGKILL, 0) == 0:
            break
        killed += 1
        in_save += any((run / "checkpoints").glob(".tmp-*"))
        try:
            assert_not_lost(run, before)
        except Lost as error:
            lost = str(error)
            break
        print(f"{name}: kill {killed} of {kills}, step {reached(run)}, newest checkpoint {newest(run)}", flush=True)
    try:
        if lost is None:
            rig.goes_on(task, run)
    except AssertionError as error:
        lost = str(error)
    if lost is not None:
        print(f"{name}: {lost}", file=sys.stderr)
    seconds = round(time.monotonic() - started)
    identical = lost is None and killed == kills
    return {"task": name, "kills": killed, "in_a_save": in_save, "identical": identical, "seconds": seconds}


def table(record: dict) -> str:
    head = ["| task | kills | of them in a save | final weights bit-identical | seconds |", "|---|---|---|---|---|"]
    rows = (
        f"| {row['task']} | {row['kills']} | {row['in_a_save']} | {row['identical']} | {row['seconds']} |"
        for row in record["tasks"]
    )
    return "\n".join([*head, *rows])
