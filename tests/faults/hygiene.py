"""What a long training holds: resident memory, open files, threads, and its run folder on the disk."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path

from faults.rig import Rig, ends, reached

TASKS = ("language_model", "masked_lm", "classification")


def run_hygiene(root: Path, steps: int) -> dict:
    """Per task: figures at a tenth of `steps` and at their end."""
    rig, rows = Rig(root, steps=steps), []
    flags = ("--eval_interval", max(steps // 20, 1), "--save_interval", max(steps // 100, 1), "--log_interval", 10)
    try:
        for name in TASKS:
            run = rig.folder() / "run"
            # Steps after the last one that is looked at: the process must be there still.
            command = rig.start(rig.tasks[name], run, *flags, "--steps", steps + 500)
            looked = []
            for step in (steps // 10, steps):
                while reached(run) < step and command.process.is_alive():
                    time.sleep(0.2)
                looked.append({"step": step, **usual_figures(command.process.pid, run)})
            ends(command, 0)
            rows.append({"task": name, "figures": looked})
            print(rows[-1], flush=True)
    finally:
        rig.end_trial()
    return {"steps": steps, "tasks": rows}


def usual_figures(pid: int, run: Path) -> dict:
    """Medians of a few looks, some of which may fall into a save."""
    looks = []
    for _ in range(9):
        with contextlib.suppress(FileNotFoundError):  # a checkpoint was just renamed or removed
            looks.append(figures(pid, run))
        time.sleep(0.05)
    return {name: statistics.median_high(look[name] for look in looks) for name in looks[0]}


def figures(pid: int, run: Path) -> dict:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    checkpoints = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    return {
        "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "checkpoint_folders": len(list((run / "checkpoints").glob("*"))),
        "checkpoints_mb": round(checkpoints / 1e6, 2),
        "log_bytes_per_step": round((run / "metrics.jsonl").stat().st_size / max(reached(run), 1), 1),
    }


def table(record: dict) -> str:
    names = ("rss_mb", "open_files", "threads", "checkpoint_folders", "checkpoints_mb", "log_bytes_per_step")
    head = "| task | step | memory, MB | open files | threads | checkpoints | their MB | log, bytes per step |"
    rows = [
        f"| {row['task']} | {look['step']:,} | {' | '.join(str(look[name]) for name in names)} |"
        for row in record["tasks"]
        for look in row["figures"]
    ]
    return "\n".join([head, "|" + "---|" * 8, *rows])
