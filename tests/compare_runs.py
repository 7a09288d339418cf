"""Compares two folders of runs number by number: whether a change of the code has changed what a training computes.

    python tests/compare_runs.py BEFORE AFTER      # each holds run folders of the same names

Compares the weights of every checkpoint, every number in metrics.jsonl but times, and in result.json the metrics, FLOPs
and sizes. Prints a line per run; exit code 1 if anything differs. Records from before metrics had names are understood.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def numbers(value, path=""):
    """(path, number) of every number in plain data."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{path}/{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def measured(run: Path) -> dict:
    result = json.loads((run / "result.json").read_text())
    deciding = result["metrics"][result["metric"]] if "metrics" in result else result["bpc"]
    best = result["best"].get("value", result["best"].get("best_bpc"))
    found = {"metric": {split: deciding[split] for split in ("valid", "test")}, "best": best}
    return found | {name: result[name] for name in ("parameters", "flops", "tokens_per_step")}


def logged(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        for part in ("train", "valid"):
            values = {"metric" if "b" in key and "bp" in key or "bits" in key else key: value
                      for key, value in line.get(part, {}).items() if key != "tokens_per_second"}  # fmt: skip
            if values:
                found[f"{line['step']}/{part}"] = values
    return found


def differences(before: Path, after: Path) -> list[str]:
    found = []
    for read in (measured, logged):
        a, b = dict(numbers(read(before))), dict(numbers(read(after)))
        found += [
            f"{path}: {a.get(path)} and {b.get(path)}" for path in sorted(a.keys() | b) if a.get(path) != b.get(path)
        ]
    files = sorted(file.relative_to(before) for file in before.glob("checkpoints/*/model.safetensors"))
    for file in files:
        a, b = load_file(before / file), load_file(after / file)
        found += [f"{file}: {name}" for name in sorted(a.keys() | b) if name not in a or name not in b]
        found += [f"{file}: {name}" for name in sorted(a.keys() & b) if not torch.equal(a[name], b[name])]
    return found if files else [*found, "no checkpoint"]


def main() -> int:
    before, after = map(Path, sys.argv[1:])
    worst = 0
    for run in sorted(path.parent for path in before.glob("*/result.json")):
        found = differences(run, after / run.name)
        worst |= bool(found)
        print(f"{run.name}: {'equal' if not found else f'{len(found)} differ, e.g. {found[:3]}'}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
