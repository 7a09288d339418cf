"""result.json: what a run measured, and what it was measured with."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from smoe.metrics import Metric
from smoe.parameters import parameter_counts
from smoe.train.config import TrainConfig, to_dict
from smoe.train.evaluation import Measured, k_name
from smoe.train.task import Task

# Where things were and how they were shown: a record is for others too, and goes without.
PLACES = ("run_dir", "run", "start_from", "teacher", "data", "tokenizer", "resume", "progress", "process_timeout")

# Fields that make an ablation of a method.
_VARIED = ("router", "score", "output_scale", "expert_dropout", "layers", "schedule", "k_min", "k_max")
_VARIED += ("balance_weight", "consistency_weight")

Sweep = dict[str, dict[str, Measured]]  # split -> k -> what was measured


def make_record(
    task: Task, chosen: list[tuple[int | None, dict[str, Any]]], swept: dict[int, Sweep], *, steps: int, **run: Any
) -> dict[str, Any]:
    """The record of a finished run: what the task and its configuration say, and ``run``: what the loop knows.

    Args:
        chosen: the best checkpoints, as (k that it was chosen at, its step and its value on valid). The metrics are
            those of the first one; the others stand under ``best_at_other_k``, with metrics if their step differs.
        swept: step of a checkpoint -> what was measured with it.
        steps: of training, fewer than ``config.steps`` where patience ended it.
    """
    config, key = task.config, task.metrics[0].key
    best = [{"step": found["step"], "metric": key, "value": found["value"], "k": k} for k, found in chosen]
    for other in best[1:]:
        if other["step"] != best[0]["step"]:
            other["metrics"] = {metric.key: _of_metric(metric, swept[other["step"]]) for metric in task.metrics}
    with torch.device("meta"):
        model = task.build_model()
    flops = flops_at_k(task, model)
    return {
        "model": task.architecture,
        "task": task.name,
        "method": config.method,
        **label(config),
        "scale": config.scale,
        "seed": config.seed,
        "dataset": task.dataset,
        **task.record,
        "metric": key,
        "metrics": {metric.key: _of_metric(metric, swept[best[0]["step"]]) for metric in task.metrics},
        "best": best[0],
        **({"best_at_other_k": best[1:]} if best[1:] else {}),
        "parameters": parameter_counts(model, filter(None, config.sweep_ks())),
        "flops": {k_name(k): flops((k or 0) * len(config.smoe_layers())) for k in config.sweep_ks()},
        "steps": steps,
        "training_flops": training_flops(config, flops, steps),
        "tokens_per_step": task.tokens_per_step,
        **{name: getattr(config, name) for name in ("expert_parallel", "fsdp", "precision")},
        "config": {field: value for field, value in to_dict(config).items() if field not in PLACES},
        **run,
    }


def _of_metric(metric: Metric, swept: Sweep) -> dict[str, Any]:
    n = {split: next(iter(by_k.values())).n for split, by_k in swept.items()}
    values = {split: {k: m.values[metric.key] for k, m in by_k.items()} for split, by_k in swept.items()}
    return {**metric.shown_as, "n": n, **values}


def label(config: TrainConfig) -> dict[str, str]:
    """A name for a run that departs from its method (an ablation), to tell it from the method's own in tables."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changed = [f"{name} {getattr(config, name)}" for name in _VARIED if getattr(config, name) != defaults[name]]
    return {"label": ", ".join([config.get_method().title, *changed])} if changed else {}


FlopsAtK = Callable[[int], dict[str, int]]


def flops_at_k(task: Task, model: nn.Module) -> FlopsAtK:
    """What ``task.flops`` counts, from the sum of k over the layers with experts (any number for a dense model).

    It is a constant plus a multiple of that sum, since all SMoE layers of a task are of one size: two counts give all,
    and take little of a short run's time. ``model`` is the task's, on meta.
    """
    layers, n = len(task.config.smoe_layers()), task.config.num_experts
    if not layers:
        dense = task.flops(model, None)
        return lambda sum_k: dense
    least, most = task.flops(model, 1), task.flops(model, n)
    span = max(layers * (n - 1), 1)  # of the sum, between the two counts
    return lambda sum_k: {key: f + (sum_k - layers) * (most[key] - f) // span for key, f in least.items()}


def training_flops(config: TrainConfig, flops: FlopsAtK, steps: int) -> int:
    """True FLOPs of so many training steps, at the k that each layer had at each."""
    sums = Counter(sum(config.ks_at(step)) for step in range(steps))
    return sum(times * flops(sum_k)["training_step"] for sum_k, times in sums.items())
