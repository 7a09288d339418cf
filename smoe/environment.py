"""What a result was made with: versions, devices, processor, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]


def environment_record() -> dict[str, Any]:
    """Versions, devices, CPU, threads, git commit of the checkout (None outside one), date in UTC. Plain data."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    packages = ("smoe", "torch", "numpy", "accelerate", "transformers")
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in packages}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "devices": [torch.cuda.get_device_name(index) for index in cuda] or ["cpu"],
        "cuda": torch.version.cuda if cuda else None,
        "cpu": {"model": cpu_model(), "cores": cores, "threads": torch.get_num_threads()},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "git": git_state(),
    }


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state(root: Path = _ROOT) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the checkout ``root``; None where this package is not part of one."""
    # A package installed somewhere below an unrelated checkout is not tracked by it.
    tracked = str(Path(__file__).resolve()) if root == _ROOT else "."
    commands = (["ls-files", "--error-unmatch", tracked], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
    try:
        done = [subprocess.run(["git", "-C", str(root), *c], capture_output=True, text=True) for c in commands]
    except OSError:  # no git
        return None
    if any(command.returncode for command in done):
        return None
    return {"commit": done[1].stdout.strip(), "dirty": bool(done[2].stdout.strip())}
