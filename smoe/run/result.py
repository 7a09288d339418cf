"""What result.json says of a run, whichever trainer made it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from smoe.run.config import to_dict
from smoe.run.record import active_per_k, parameter_counts
from smoe.run.trainer_config import TrainerConfig

# Where things were and how they were shown: a record is for others too, and goes without.
PLACES = ("run_dir", "data", "resume", "progress", "process_timeout")

Bpc = dict[str, dict[str, float]]  # split -> k -> bits per character (or masked token)


def k_name(k: int | None) -> str:
    """The key of a k in result.json: the number, or ``dense``."""
    return "dense" if k is None else str(k)


def sweep(config: TrainerConfig, measure: Callable[[str, int | None], float], is_main: bool = True) -> Bpc:
    """``measure(split, k)`` on valid and test at every k of the configuration's sweep, said as it goes."""
    bpc: Bpc = {"valid": {}, "test": {}}
    for k in config.sweep_ks():
        for split in bpc:
            bpc[split][k_name(k)] = measure(split, k)
        if is_main:
            figures = ", ".join(f"{split} {bpc[split][k_name(k)]:.4f}" for split in bpc)
            print(f"{'dense' if k is None else f'k = {k:2}'}: BPC {figures}", flush=True)
    return bpc


def flops_per_k(
    config: TrainerConfig,
    evaluation: Callable[[int | None], tuple[int, int]],
    training_step: Callable[[int | None], int],
) -> dict[str, dict[str, int]]:
    """By k: one evaluation pass by the paper's count and the true one, and one training step (forward and backward)."""
    flops = {}
    for k in config.sweep_ks():
        paper, true = evaluation(k)
        flops[k_name(k)] = {"paper": paper, "true": true, "training_step": training_step(k)}
    return flops


def run_result(
    config: TrainerConfig,
    model: nn.Module,
    *,
    name: str,
    dataset: dict[str, Any],
    bpc: Bpc,
    best: dict[str, Any],
    flops: dict[str, dict[str, int]],
    seconds: float,
    sweep_seconds: float,
    tokens_per_step: int,
    processes: int,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The record of a finished run.

    Args:
        model: the whole one, on any device, for its parameters; ``name`` is what tables call it.
        seconds, sweep_seconds: of all training steps, and of the sweep over k.
        environment: ``record.environment_record()`` as it was when the run started.
    """
    counts: dict[str, Any] = parameter_counts(model)
    counts["active_per_k"] = active_per_k(model, [k for k in config.sweep_ks() if k is not None])
    limits = [field.name for field in dataclasses.fields(config) if field.name in ("eval_tokens", "eval_sequences")]
    return {
        "model": name,
        "method": config.method,
        **label(config),
        "scale": config.scale,
        "seed": config.seed,
        "dataset": dataset,
        "bpc": bpc,
        **{limit: getattr(config, limit) for limit in limits},
        "best": best,
        "parameters": counts,
        "flops": flops,
        "seconds": {"training": seconds, "sweep": sweep_seconds, "per_step": seconds / config.steps},
        "tokens_per_step": tokens_per_step,
        "tokens_per_second": tokens_per_step * config.steps / seconds,
        "processes": processes,
        "expert_parallel": config.expert_parallel,
        "fsdp": config.fsdp,
        "precision": config.precision,
        "config": {field: value for field, value in to_dict(config).items() if field not in PLACES},
        "environment": environment,
    }


def label(config: TrainerConfig) -> dict[str, str]:
    """A name for a run that departs from its method (an ablation), to tell it from the method's own in tables."""
    names = ("router", "score", "output_scale", "schedule", "k_min", "k_max", "balance_weight", "consistency_weight")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changed = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) != defaults[name]]
    return {"label": ", ".join([config.get_method().title, *changed])} if changed else {}
