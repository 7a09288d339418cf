"""Records of runs that never ran, whose numbers follow a formula in which the paper's findings hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoe.methods import METHODS
from smoe.metrics import BITS_PER_MASKED_TOKEN, BPC
from smoe.modulize.layers import chosen_layers

KS = (1, 2, 4, 8, 12, 16)
BASE = {
    "dense_dropout": 2.20,
    "dense_concrete_dropout": 2.30,
    "dense_dropblock": 2.25,
    "thor": 2.40,
    "smoe": 2.24,
    "smoe_dropout": 2.15,
}
ROUTER = {"hash": 0.10, "uniform": 0.20}
LAYERS = {"all": 0.0, "early": 0.06, "middle": 0.04, "later": 0.02, "every-2": 0.03}


def noise(seed: int, place: float) -> float:
    """Small, and another one for each seed and run."""
    return 0.004 * (((seed * 7919 + round(place * 1e4) * 104729) % 1000) / 1000 - 0.5)


def value_of(method: str, k: int | None, seed: int, config: dict[str, Any]) -> float:
    """Made-up bits per byte."""
    n, depth = config["num_experts"], config["num_layers"]
    value = BASE[method] - 0.05 * (depth - 4) / 4 - 0.02 * (config["d_hidden"] / 64 - 16) / 16
    if method == "smoe":
        value += 0.02 * (depth - 4) / 4 + 0.01 * (n - 16) / 16 + (0.2 if depth == 12 else 0)
        value += 0.01 * abs(k - 2)
    if method == "smoe_dropout":
        constant = config.get("schedule") == "constant"
        value += (0.01 if constant else 0.03) * (n - k) + (0.2 if constant else 0)
        value += ROUTER.get(config.get("router"), 0.0) + LAYERS[config.get("layers", "all")]
    return value + noise(seed, value)


def made_up(method: str, seed: int = 1, *, model: str = "transformer_xl", scale: str = "cpu", **config: Any) -> dict:
    """A record as ``smoe.train`` writes it."""
    metric = BPC if model == "transformer_xl" else BITS_PER_MASKED_TOKEN
    config = {"num_layers": 4, "d_hidden": 1024, "num_experts": 16, "steps": 3000, "output_scale": 1, **config}
    config |= {"method": method, "seed": seed, "scale": scale}
    n, expert = config["num_experts"], config["d_hidden"] // config["num_experts"]
    routed = METHODS[method].routed
    ks = [k for k in KS if k <= n] if routed else [None]
    test = {"dense" if k is None else str(k): value_of(method, k, seed, config) for k in ks}
    layers = len(chosen_layers(config.get("layers", "all"), config["num_layers"]))
    total = 300_000 + config["num_layers"] * 256 * config["d_hidden"]
    active = {str(k): total - layers * 256 * expert * (n - k) for k in ks if k}
    flops = {key: {"paper": 10 * active.get(key, total), "true": 12 * active.get(key, total)} for key in test}
    floors = {} if model == "transformer_xl" else {"floors": {"unigram": {"valid": 8.6, "test": 8.7}}}
    return floors | {
        "model": model,
        "task": "language_model" if model == "transformer_xl" else "masked_lm",
        "method": method,
        "scale": scale,
        "seed": seed,
        "dataset": {"name": "enwik8", "sha256": "0" * 64},
        "metric": metric.key,
        "metrics": {
            metric.key: {
                **metric.shown_as,
                "n": {"valid": 131072, "test": 131072},
                "valid": {key: value + 0.05 for key, value in test.items()},
                "test": test,
            }
        },
        "best": {"step": 3000, "metric": metric.key, "value": 2.2, "k": 16 if routed else None},
        "parameters": {"total": total, **({"active_per_k": active} if routed else {})},
        "flops": {key: {**counts, "training_step": 3 * counts["true"]} for key, counts in flops.items()},
        "seconds": {"training": 300.0, "per_step": 0.1},
        "config": config,
        "environment": {"date": "2026-11-26T00:00:00+00:00"},
    }


ACCURACY = {"title": "Accuracy", "unit": "share of n examples", "direction": "higher"}


def fine_tuned(
    method: str,
    seed: int = 1,
    *,
    right: dict[str, list[bool]],
    keep: int | None = None,
    model: str = "transformer_xl",
    dataset: str = "sst2",
    task: str = "classification",
    metric: str = "accuracy",
    teacher: str | None = None,
    **config: Any,
) -> dict:
    """A record of a fine-tuning with all 16 experts of a run or with ``keep`` of them; ``right``: by k, by example."""
    config = {"schedule": None if method.startswith("dense") else "constant", "keep": keep, **config}
    sizes = {} if keep is None else {"num_experts": keep, "d_hidden": 64 * keep}
    record = made_up(method, seed, model=model, **config | sizes)
    shares = {key: sum(of_k) / len(of_k) for key, of_k in right.items()}
    n = len(next(iter(right.values())))
    record |= {"task": task, "metric": metric, "dataset": {"name": dataset, "sha256": dataset.encode().hex()}}
    record["metrics"] = {metric: {**ACCURACY, "n": {"valid": n, "test": n}, "valid": shares, "test": shares}}
    record["pretrained"] = {"scale": "cpu", "seed": seed, "step": 3000} | ({"num_experts": 16} if keep else {})
    record["floors"] = {"most_frequent": {"test": 0.3}}
    if config.get("fold") is not None:
        record["fold"] = config["fold"]
    if teacher is not None:
        record |= {"task": "distillation", "teacher": {"method": teacher, "d_hidden": 1024}}
    return record


def every_panel(seeds: tuple[int, ...] = (1, 2, 3)) -> list[dict]:
    """Table 1 and every panel of Figures 1, 3 and 5."""
    records = []
    for seed in seeds:
        records += [made_up(method, seed) for method in METHODS]
        records += [made_up("dense_dropout", seed, d_hidden=width) for width in (64, 128, 256, 512)]
        for method in ("dense_dropout", "smoe", "smoe_dropout"):
            records += [made_up(method, seed, num_layers=depth) for depth in (2, 8, 12)]
        for method in ("smoe", "smoe_dropout"):
            records += [made_up(method, seed, num_experts=n, d_hidden=64 * n) for n in (2, 4, 8)]
        records += [made_up("smoe_dropout", seed, router=router) for router in ROUTER]
        records += [made_up("smoe_dropout", seed, schedule="constant", k_min=16, k_max=16)]
        records += [made_up("smoe_dropout", seed, layers=layers) for layers in LAYERS if layers != "all"]
    return records


def write(folder: Path, records: list[dict]) -> None:
    """Each record as a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        (folder / f"{record['method']}-{number}-seed{record['seed']}.json").write_text(json.dumps(record))
