"""The drill: so many faults of every kind, in a table and a record."""

from __future__ import annotations

import itertools
import json
import os
import random as random_module
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.kinds import KINDS, Kind
from faults.rig import Hang, Lost, Rig, Unclear

from smoe.environment import environment_record

OUTCOMES = ("survived", "lost", "hangs", "unclear")


def plan(faults: int, only: str | None = None) -> list[tuple[Kind, str]]:
    """Kinds by their shares, each with the tasks that it is for in turn: at least one of every kind."""
    kinds = [KINDS[only]] if only else list(KINDS.values())
    total, chosen = sum(kind.share for kind in kinds), []
    for kind in kinds:
        count = faults if only else max(round(faults * kind.share / total), 1)
        chosen += [(kind, kind.tasks[i % len(kind.tasks)]) for i in range(count)]
    while len(chosen) < faults:
        chosen.append((kinds[0], kinds[0].tasks[len(chosen) % len(kinds[0].tasks)]))
    return chosen


def run_fault(rig: Rig, kind: Kind, task: str, random: random_module.Random) -> str:
    """Which of OUTCOMES; what went wrong is on stderr."""
    try:
        kind.run(rig, rig.tasks[task], random)
        return "survived"
    except Hang as error:
        outcome, message = "hangs", str(error)
    except Unclear as error:
        outcome, message = "unclear", str(error)
    except Lost as error:
        outcome, message = "lost", str(error)
    except Exception:  # of the drill itself, or of what a run is compared by
        outcome, message = "lost", traceback.format_exc()
    print(f"{kind.name} of {task}: {outcome}: {message}", file=sys.stderr, flush=True)
    return outcome


def run_drill(root: Path, faults: int, seed: int, only: str | None = None, jobs: int = 1) -> dict:
    """The record of `faults` faults, in an order drawn from `seed`, `jobs` at a time."""
    trials = [(number, *trial) for number, trial in enumerate(plan(faults, only))]
    counts: dict[str, Counter] = {kind.name: Counter() for _, kind, _ in trials}
    random_module.Random(seed).shuffle(trials)
    rig, started, done = Rig(root), time.monotonic(), itertools.count(1)

    def one(trial: tuple[int, Kind, str]) -> None:
        number, kind, task = trial
        before = time.monotonic()
        outcome = run_fault(rig, kind, task, random_module.Random(f"{seed}/{number}"))
        seconds = time.monotonic() - before
        rig.end_trial()
        counts[kind.name].update({"times": 1, outcome: 1, "seconds": seconds})
        print(f"{next(done)}/{len(trials)} {kind.name} {task}: {outcome}, {seconds:.1f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, trials))
    rows = [
        {"kind": name, "fault": KINDS[name].title, "times": count["times"]}
        | {outcome: count[outcome] for outcome in OUTCOMES}
        | {"seconds": round(count["seconds"] / count["times"], 1)}
        for name, count in counts.items()
    ]
    return {
        "faults": len(trials),
        "seed": seed,
        "jobs": jobs,
        "seconds": round(time.monotonic() - started),
        "kinds": rows,
    }


def table(record: dict) -> str:
    """Markdown; `seconds` is the mean of a fault with everything that it is compared by."""
    head = ("fault", "times", *OUTCOMES, "seconds each")
    rows = [
        [row["fault"], row["times"], *(row[outcome] for outcome in OUTCOMES), f"{row['seconds']:.1f}"]
        for row in record["kinds"]
    ]
    total = [sum(row[name] for row in record["kinds"]) for name in ("times", *OUTCOMES)]
    each = sum(row["seconds"] * row["times"] for row in record["kinds"]) / total[0]
    rows.append(["all", *total, f"{each:.1f}"])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_record(file: Path, part: str, record: dict) -> None:
    """Puts a part into the record of all drills, with what it was measured with."""
    whole = json.loads(file.read_text()) if file.exists() else {}
    environment = environment_record()
    whole[part] = record | {"cpus": os.cpu_count(), "environment": environment}
    file.write_text(json.dumps(whole, indent=1) + "\n")
