"""A disk that fills or is read-only, and a run folder that goes away."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from faults import injections
from faults.kinds.kind import Random, kind
from faults.rig import HALF, Lost, Rig, TinyTask, assert_not_lost, can_mount, ends, newest, small_disk, steps_there


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
