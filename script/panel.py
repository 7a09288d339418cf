"""Runs all trainings of a table or figure; its all.sh calls this.

    bash script/figure5/all.sh [--panel a c] [--only NAME ...] [--seeds 1 2 3] [--scale cpu] [--jobs 2] [--dry_run]
                               [--collect [DIR]] [flags of the trainer, for every run]

script/<table or figure>/runs.yaml lists the runs of each panel. A run is known by its script and flags: they make its
run folder, the same as if the script was called by hand. What has a result.json there is skipped, what was cut off goes
on from its newest checkpoint; so this may be stopped or killed at any time, and the same command finishes the rest. A
run that fails does not stop the others, nor does one that was finished with other settings, since a scale has changed.
What a run prints goes to output.log in its run folder.

Several of these at once share the work: who runs something holds a lock on its run folder. The lock belongs to the
training as well, so that one whose all.sh was killed is waited for, not started again.

Exit code: 0 all runs are finished; 1 some failed; 2 bad flags; 75 stopped by a signal, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panel_runs import PLACES, ROOT, Run, chosen_runs, config_class, from_here, given_flags, other_source

BAD_INPUT, STOPPED = 2, 75
_POLL = 0.2  # seconds


# ---- running them ---------------------------------------------------------------------------------------------------
class Child:
    """A run at work, in a session of its own: Ctrl-C reaches it through us alone, and once."""

    def __init__(self, run: Run, lock: int, environment: dict[str, str]) -> None:
        """``lock`` is passed on: the training holds it until it ends, whatever becomes of us."""
        self.run, self.started = run, time.monotonic()
        with open(run.log, "ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "script" / f"{run.name}.sh"), *run.flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
                cwd=ROOT,  # where relative paths start
                env=environment,
            )
        os.close(lock)

    def last_line(self) -> str:
        """The last thing it printed: where it failed, its error."""
        with open(self.run.log, "rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


class Panel:
    """The runs of one command, at most ``jobs`` at a time; ``results``: the folder that their records are copied to."""

    def __init__(self, runs: Sequence[Run], jobs: int, results: Path | None) -> None:
        self.waiting, self.jobs, self.results = deque(runs), jobs, results
        self.running: list[Child] = []
        self.finished = self.failed = self.interrupted = 0
        self.stopped = False
        # Side by side, each run has a core. What the user set stays.
        self.environment = {**({"OMP_NUM_THREADS": "1"} if jobs > 1 else {}), **os.environ}

    def work(self) -> int:
        """Runs all; returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        elsewhere = 0
        while self.running or (self.waiting and not self.stopped):
            self._start()
            if not self.running and self.waiting and elsewhere != len(self.waiting):
                elsewhere = len(self.waiting)
                say(f"waiting for {elsewhere} that run already, for another all.sh or one that was killed")
            time.sleep(_POLL)
            for child in [child for child in self.running if child.process.poll() is not None]:
                self.running.remove(child)
                self._ended(child)
        left = self.interrupted + len(self.waiting)
        say(f"{self.finished} finished, {self.failed} failed, {left} left")
        return STOPPED if left else int(self.failed > 0)

    def _start(self) -> None:
        """Starts what may start. What another process is at work on goes to the end of the queue, and so does what
        would wait for a pretrained run that a child is training."""
        for _ in range(len(self.waiting)):
            if self.stopped or len(self.running) == self.jobs:
                return
            run = self.waiting.popleft()
            if run.starts_from in self._pretraining():
                self.waiting.append(run)
                continue
            lock = None if run.result.exists() else take_lock(run)
            if run.result.exists():  # asked once more: it may have been finished until we had the lock
                if lock is not None:
                    os.close(lock)
                if change := changed_since(run):
                    self._has_failed(run, change)
                else:
                    self._is_finished(run, "was finished before")
            elif lock is None:
                self.waiting.append(run)
            else:
                say(f"started: {run}, log in {os.path.relpath(run.log, ROOT)}")
                self.running.append(Child(run, lock, self.environment))

    def _pretraining(self) -> set[Path]:
        """The pretrained runs that children train first, or wait for."""
        needed = {child.run.starts_from for child in self.running} - {None}
        return {folder for folder in needed if not (folder / "result.json").exists()}

    def _ended(self, child: Child) -> None:
        took, status = duration(time.monotonic() - child.started), child.process.returncode
        if child.run.result.exists():
            self._is_finished(child.run, f"in {took}")
        elif self.stopped or status == STOPPED:
            self.interrupted += 1
            say(f"stopped: {child.run}, the same command goes on")
        else:
            killed = status < 0 or status > 125  # by a signal, of which it could say nothing
            self._has_failed(child.run, f"after {took}: {f'exit code {status}' if killed else child.last_line()}")

    def _is_finished(self, run: Run, how: str) -> None:
        self.finished += 1
        say(f"finished: {run}, {how}")
        if self.results is not None:
            collect(run, self.results)

    def _has_failed(self, run: Run, why: str) -> None:
        self.failed += 1
        say(f"failed: {run}, {why}")

    def _stop(self, *_: object) -> None:
        self.stopped = True
        for child in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGTERM)


def take_lock(run: Run) -> int | None:
    """The descriptor of the run folder's lock file, locked; None if another process has it.

    Every copy of the descriptor, in whatever process, must be closed before it is free. The file is never removed:
    somebody could hold a lock on the removed one.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def changed_since(run: Run) -> str | None:
    """What differs between a finished run and what its flags mean today; None if nothing does.

    The same flags mean something else when a scale or a default has changed. A field that the run's version did not
    have is no difference, unless it is known what was done before it (``smoe/earlier.py``).
    """
    recorded = run.folder / "config.yaml"
    if not recorded.exists():
        return None
    from smoe.earlier import with_earlier
    from smoe.train.command import parse_config  # seconds of imports
    from smoe.train.config import to_dict
    from smoe.train.resume import MAY_CHANGE
    from smoe.yaml_files import load_yaml

    where = os.path.relpath(run.folder, ROOT)
    try:
        if other := other_source(run):
            return f"{where} {other}; to train on this one, move that folder away"
        today = to_dict(parse_config(config_class(run), run.all_flags).resolved())
        for name, value in with_earlier(load_yaml(recorded), today).items():
            if name in today and name not in MAY_CHANGE and today[name] != value:
                return (
                    f"{name} is {value!r} in {where}, but {today[name]!r} today; to run it again, move that folder away"
                )
    except ValueError as error:
        return str(error)
    return None


def collect(run: Run, results: Path) -> None:
    """Copies the run's record to RESULTS/figure5/cpu/8layers_smoe_dropout-seed1.json, and its predictions, if it has
    some, to 8layers_smoe_dropout-seed1.predictions.jsonl.gz beside it (HotpotQA has two more files), each in one piece.
    """
    record = json.loads(run.result.read_text(encoding="utf-8"))
    figure, *folders, name = run.name.split("/")
    # In the name already; and where the data are on this machine: what they are is in the record.
    left_out = ("scale", "seed", *(place for place in PLACES if place != "start_from"))
    words = [name]
    for flag, values in given_flags(run.flags):
        values = [os.path.basename(value.rstrip("/")) for value in values] if flag == "start_from" else values
        words += [] if flag in left_out else [re.sub(r"[^\w.-]", "-", word) for word in (flag, *values)]
    name = "_".join(words)
    target = results.joinpath(figure, record["scale"], *folders, f"{name}-seed{record['seed']}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    for predictions in run.folder.glob("predictions*.jsonl"):  # first, so that no record is without
        packed = gzip.compress(predictions.read_bytes(), mtime=0)  # the same predictions give the same bytes
        _write(target.with_suffix(f".{predictions.name}.gz"), packed)
    _write(target, run.result.read_bytes())


def _write(target: Path, content: bytes) -> None:
    aside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, target)


# ---- saying what there is to do -------------------------------------------------------------------------------------
def dry_run(runs: Sequence[Run], jobs: int) -> None:
    """One line per run: its state, and how long the last such run took."""
    states = [state_of(run) for run in runs]
    times = [run.seconds() for run in runs]
    for run, state, seconds in zip(runs, states, times, strict=True):
        print(f"{state:9} {duration(seconds):>12}  {run}")
    parts = [f"{states.count('finished')} of {len(runs)} finished"]
    if changed := states.count("changed"):
        parts.append(f"{changed} finished with other settings, to be moved away")
    left = [seconds for seconds, state in zip(times, states, strict=True) if state not in ("finished", "changed")]
    if known := [seconds for seconds in left if seconds is not None]:
        parts.append(f"{len(known)} take about {duration(sum(known) / jobs)} together")
    if len(known) < len(left):
        parts.append(f"{len(left) - len(known)} that have never run take an unknown time")
    print("; ".join(parts))


def state_of(run: Run) -> str:
    """``finished``, ``changed`` (finished with other settings), ``running``, ``cut off`` (goes on), or ``new``."""
    if run.result.exists():
        return "changed" if changed_since(run) else "finished"
    if (run.folder / ".lock").exists():
        lock = take_lock(run)
        if lock is None:
            return "running"
        os.close(lock)
    return "cut off" if (run.folder / "config.yaml").exists() else "new"


def duration(seconds: float | None) -> str:
    """E.g. ``2 h 05 min``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


# ---- the command line -----------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """Its complaints are one line."""

    def error(self, message: str) -> Any:
        self.exit(BAD_INPUT, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        usage="bash script/FIGURE/all.sh [flags]",
        description="Runs all trainings of a table or figure. Other flags go to the trainer of every run. A relative "
        f"path of {', '.join(f'--{place}' for place in PLACES)} and --collect starts where this is called, any other "
        "at the root of the repository.",
        allow_abbrev=False,
    )
    parser.add_argument("figure", help=argparse.SUPPRESS)
    parser.add_argument("--panel", nargs="+", metavar="PANEL", help="these panels (default: all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scripts with these names, which may have a *")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="each run with these seeds (default: 1)")
    parser.add_argument("--scale", help="of all runs (default: paper on a GPU, else cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; if several, with one core each")
    parser.add_argument("--dry_run", action="store_true", help="say what would run, and how long such runs took")
    collected = "copy the records of finished runs there (default: results)"
    parser.add_argument("--collect", nargs="?", const=ROOT / "results", metavar="DIR", help=collected)
    options, more = parser.parse_known_args(arguments)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs: {options.jobs}, it must be at least 1")
        for flag in ("--seed", "--run_dir", "--resume"):
            if any(word.split("=")[0] in (flag, flag.replace("_", "-")) for word in more):
                raise ValueError(f"{flag} is of a single run; {'give --seeds' if flag == '--seed' else 'leave it out'}")
        here = Path(os.environ.get("CALLED_FROM", os.getcwd()))  # panel.sh has changed the folder
        runs = chosen_runs(options, from_here(more, here))
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        dry_run(runs, options.jobs)
        return 0
    return Panel(runs, options.jobs, None if options.collect is None else here / options.collect).work()


if __name__ == "__main__":
    sys.exit(main())
