"""What a result was made with: versions, machine, commit, and the size of the model."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = ("torch", "numpy", "accelerate", "transformers")


def environment_record() -> dict[str, Any]:
    """Versions, devices, CPU, threads, git commit of the checkout (None outside one), date in UTC. Plain data."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "smoe": _version("smoe"),
            **{p: _version(p) for p in PACKAGES},
        },
        "devices": [torch.cuda.get_device_name(index) for index in cuda] or ["cpu"],
        "cuda": torch.version.cuda if cuda else None,
        "cpu": {"model": cpu_model(), "cores": _usable_cores(), "threads": torch.get_num_threads()},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "git": git_state(),
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters: `total`, `trainable`, `experts` (inside modules named `experts`), `rest`; each one once."""
    experts = {id(p) for name, p in model.named_parameters() if "experts" in name.split(".")}
    sizes = {id(p): p.numel() for p in model.parameters()}
    total = sum(sizes.values())
    in_experts = sum(size for key, size in sizes.items() if key in experts)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "experts": in_experts, "rest": total - in_experts}


def active_per_k(model: nn.Module, ks: Iterable[int]) -> dict[str, int]:
    """Parameters that one token passes through at each number k of activated experts, keyed by k as text.

    Counts everything outside the experts, and min(k, N) of every layer's N experts (layers with `experts` and
    `num_experts`). A model without such layers has the same number at every k.
    """
    layers = [
        m for m in model.modules() if hasattr(m, "num_experts") and isinstance(getattr(m, "experts", None), nn.Module)
    ]
    outside = sum(p.numel() for p in model.parameters())
    per_expert = []
    for layer in layers:
        size = sum(p.numel() for p in layer.experts.parameters())
        outside -= size
        per_expert.append((size // layer.num_experts, layer.num_experts))
    return {str(k): outside + sum(size * min(k, count) for size, count in per_expert) for k in ks}


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state(root: str | Path | None = None) -> dict[str, Any] | None:
    """`{"commit", "dirty"}` of the checkout that holds this package (or `root`); None outside a checkout.

    A package installed somewhere below an unrelated checkout is not part of it, so the file must be tracked.
    """
    here = Path(__file__).resolve()
    root = here.parents[2] if root is None else Path(root)
    tracked = "smoe/run/record.py" if root == here.parents[2] else "."
    if _git(root, "ls-files", "--error-unmatch", tracked) is None:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    """The imported module's own word first (a checkout need not be installed), then the installed package's."""
    own = getattr(sys.modules.get(package), "__version__", None)
    if own is not None:
        return str(own)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
