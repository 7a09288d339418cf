"""What runs cost: FLOPs and seconds of their own records, and seconds per step measured interleaved."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from smoe.errors import one_line
from smoe.json_files import load_json
from smoe.report.records import Record, parameters_at
from smoe.report.runs import Cell

# In the folder of results; written by benchmarks.methods and benchmarks.encoder.
STEP_TIMES, ENCODER_TIMES = "step_times.json", "encoder_times.json"


def check_costs(record: Record, name: str) -> None:
    """ValueError in one line when ``flops`` or ``seconds.per_step`` is there but not what it must be."""
    flops, seconds = record.get("flops"), record.get("seconds")
    for field, value in (("flops", flops), ("seconds", seconds)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}: {field} is {reprlib.repr(value)}; it must be numbers by name")
    for key, counts in (flops or {}).items():
        where = f"{name}: flops.{one_line(key)}"
        if not isinstance(counts, Mapping):
            raise ValueError(f"{where} is {reprlib.repr(counts)}; it must be numbers by name")
        for kind, value in counts.items():
            _check_number(value, f"{where}.{one_line(kind)}")
    _check_number((seconds or {}).get("per_step", 0), f"{name}: seconds.per_step")


def flops_of(cell: Cell, key: str, kind: str) -> float | None:
    """FLOPs at this k: ``paper`` or ``true`` of a forward pass, ``training_step``; None if the record has none."""
    return ((cell.first.record.get("flops") or {}).get(key) or {}).get(kind)


def seconds_of(cell: Cell) -> float | None:
    """Seconds per training step by the runs' own clocks, the median over them; they may have run beside other work."""
    seconds = [(run.record.get("seconds") or {}).get("per_step") for run in cell.runs]
    known = [one for one in seconds if one is not None]
    return median(known) if known else None


def parameters_of(cell: Cell, key: str) -> float:
    """Parameters that one token uses at this k."""
    return parameters_at(cell.first.record, key)


def read_step_times(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of ``step_times.json`` in a folder, none if there is no such file; and what is wrong with it, by line.

    A row has ``model``, ``scale``, ``method``, ``k`` (a number, text for a whole schedule, or null), ``as_trained``
    (whether the method is trained at this k), ``seconds_per_step`` and ``flops_per_step``; and, where they are known,
    ``processor``, ``threads`` and ``precision``.
    """
    return _read_rows(folder, STEP_TIMES, ("model", "scale", "method"), ("seconds_per_step", "flops_per_step"))


def read_encoder_times(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The same of ``encoder_times.json``.

    A row has ``encoder``, ``dataset``, ``scale``, ``method``, ``experts`` (that are there, null of a dense model),
    ``k`` (that are activated, likewise), ``milliseconds`` per example and ``megabytes``.
    """
    return _read_rows(folder, ENCODER_TIMES, ("encoder", "dataset", "scale", "method"), ("milliseconds", "megabytes"))


def _read_rows(
    folder: str | Path, name: str, texts: Sequence[str], numbers: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    file = Path(folder) / name
    if not file.is_file():
        return [], []
    try:
        content = load_json(file)
        rows = content["records"]
        for number, row in enumerate(rows):
            for field in texts:
                if not isinstance(row[field], str):
                    raise ValueError(f"records.{number}.{field} is {reprlib.repr(row[field])}; it must be text")
            for field in numbers:
                _check_number(row[field], f"records.{number}.{field}")
    except KeyError as error:
        return [], [f"{name}: {error.args[0]} is missing"]
    except (OSError, ValueError, TypeError) as error:
        return [], [f"{name}: {error}"]
    machine = {field: content[field] for field in ("processor", "threads") if field in content}
    return [machine | row for row in rows], []


def measured_seconds(rows: list[dict[str, Any]], model: str, scale: str, method: str) -> float | None:
    """Seconds per step of a method as it is trained, measured interleaved with the others; None if it was not."""
    for row in rows:
        if (row["model"], row["scale"], row["method"]) == (model, scale, method) and row.get("as_trained"):
            return row["seconds_per_step"]
    return None


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e300:
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be a number of at least 0")
