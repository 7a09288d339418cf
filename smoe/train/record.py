"""result.json: what a run measured, and what it was measured with."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smoe.control import smoe_layers
from smoe.train.config import TrainConfig, to_dict
from smoe.train.evaluation import Measured, k_name
from smoe.train.task import Task

PACKAGES = ("torch", "numpy", "accelerate", "transformers")

# Where things were and how they were shown: a record is for others too, and goes without.
PLACES = ("run_dir", "data", "resume", "progress", "process_timeout")

# Fields that make an ablation of a method.
_VARIED = ("router", "score", "output_scale", "layers", "schedule", "k_min", "k_max")
_VARIED += ("balance_weight", "consistency_weight")


def make_record(task: Task, swept: dict[str, dict[str, Measured]], **run: Any) -> dict[str, Any]:
    """The record of a finished run: what the task and its configuration say, and ``run``: what the loop knows.

    ``swept``: split -> k -> what was measured.
    """
    config = task.config
    with torch.device("meta"):
        model = task.build_model()
    ks = config.sweep_ks()
    limits = [f.name for f in dataclasses.fields(config) if f.name in ("eval_tokens", "eval_sequences")]
    return {
        "model": task.architecture,
        "task": task.name,
        "method": config.method,
        **label(config),
        "scale": config.scale,
        "seed": config.seed,
        "dataset": task.dataset,
        "metric": task.metrics[0].key,
        "metrics": {metric.key: _of_metric(metric, swept) for metric in task.metrics},
        **{limit: getattr(config, limit) for limit in limits},
        "parameters": parameter_counts(model) | {"active_per_k": {str(k): active(model, k) for k in ks if k}},
        "flops": {k_name(k): task.flops(model, k) for k in ks},
        "training_flops": training_flops(task, model),
        "tokens_per_step": task.tokens_per_step,
        "expert_parallel": config.expert_parallel,
        "fsdp": config.fsdp,
        "precision": config.precision,
        "config": {field: value for field, value in to_dict(config).items() if field not in PLACES},
        **run,
    }


def _of_metric(metric: Any, swept: dict[str, dict[str, Measured]]) -> dict[str, Any]:
    described = {"title": metric.title, "unit": metric.unit, "direction": metric.direction}
    described["n"] = {split: next(iter(by_k.values())).n for split, by_k in swept.items()}
    return described | {split: {k: m.values[metric.key] for k, m in by_k.items()} for split, by_k in swept.items()}


def label(config: TrainConfig) -> dict[str, str]:
    """A name for a run that departs from its method (an ablation), to tell it from the method's own in tables."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changed = [f"{name} {getattr(config, name)}" for name in _VARIED if getattr(config, name) != defaults[name]]
    return {"label": ", ".join([config.get_method().title, *changed])} if changed else {}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters: ``total``, ``trainable``, ``experts`` (of SMoE layers), ``rest``; each one once."""
    experts = sum(p.numel() for _, layer in smoe_layers(model) for p in layer.experts.parameters())
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "experts": experts, "rest": total - experts}


def active(model: nn.Module, k: int) -> int:
    """Parameters that one token passes through: all outside the experts, and k of every layer's N experts."""
    idle = 0
    for _, layer in smoe_layers(model):
        size = sum(p.numel() for p in layer.experts.parameters())
        idle += size // layer.num_experts * (layer.num_experts - min(k, layer.num_experts))
    return sum(p.numel() for p in model.parameters()) - idle


def training_flops(task: Task, model: nn.Module) -> int:
    """True FLOPs of all training steps, at the k that each layer had at each.

    A step's FLOPs are a constant plus a multiple of the sum of its layers' k, since all SMoE layers are of one size.
    """
    config = task.config
    if not config.smoe_layers():
        return config.steps * task.flops(model, None)["training_step"]
    layers, n = len(config.smoe_layers()), config.num_experts
    least = task.flops(model, 1)["training_step"]
    slope = (task.flops(model, n)["training_step"] - least) // max(layers * (n - 1), 1)
    return config.steps * least + slope * sum(sum(config.ks_at(step)) - layers for step in range(config.steps))


def environment_record() -> dict[str, Any]:
    """Versions, devices, CPU, threads, git commit of the checkout (None outside one), date in UTC. Plain data."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in ("smoe", *PACKAGES)},
        "devices": [torch.cuda.get_device_name(index) for index in cuda] or ["cpu"],
        "cuda": torch.version.cuda if cuda else None,
        "cpu": {"model": cpu_model(), "cores": cores, "threads": torch.get_num_threads()},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "git": git_state(),
    }


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state(root: str | Path | None = None) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the checkout that holds this package (or ``root``); None outside a checkout.

    A package installed somewhere below an unrelated checkout is not part of it, so the file must be tracked.
    """
    here = Path(__file__).resolve()
    tracked = here.relative_to(here.parents[2]).as_posix() if root is None else "."
    root = here.parents[2] if root is None else Path(root)
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


def _version(package: str) -> str | None:
    """The imported module's own word first (a checkout need not be installed), then the installed package's."""
    own = getattr(sys.modules.get(package), "__version__", None)
    if own is not None:
        return str(own)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
