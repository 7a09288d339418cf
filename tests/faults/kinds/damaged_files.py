"""Files of a checkpoint, a run folder or a data set that are damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from faults.kinds.kind import ALL, DAMAGES, MAPPED, Random, in_turn, kind
from faults.rig import Lost, Rig, TinyTask, Unclear, assert_not_lost, ends, newest, steps_there


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
