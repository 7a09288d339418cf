"""All run records under a folder: found, checked, each kind of run and seed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoe.errors import one_line
from smoe.json_files import load_json
from smoe.report.costs import STEP_TIMES, check_costs
from smoe.report.predictions import predictions_of, read_right
from smoe.report.records import check_result, examples_of, in_todays_form, values_of
from smoe.report.runs import Run, read_run

# A JSON object with three of these is meant to be a run record; outputs of benchmarks have one at most.
_MARKS = ("model", "method", "scale", "seed", "dataset", "metrics", "bpc", "best", "config")


def collect(folder: str | Path) -> tuple[list[Run], list[str]]:
    """The runs under ``folder`` and, one line each, the files that were left out and why.

    JSON files that are no run records (outputs of benchmarks) are skipped without a word. A record that is there twice
    counts once. Of two different records of one kind of run and seed the newer one counts, and the other is named.
    ValueError when the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"results: {folder} does not exist; it must be a folder with records of runs")
    found: dict[tuple, tuple[str, Run]] = {}
    problems: list[str] = []
    for path in sorted(folder.rglob("*.json")):
        if path == folder / STEP_TIMES:  # read_step_times does
            continue
        name = path.relative_to(folder).as_posix()
        try:
            run = _read(path, name)
            run = None if run is None else _with_predictions(run, path, name, problems)
        except ValueError as error:
            problems.append(one_line(error))
            continue
        if run is None:
            continue
        key = (run.record["model"], run.record["scale"], run.seed, run.identity)
        other = found.get(key)
        if other is None or run.record == other[1].record:
            found.setdefault(key, (name, run))
            continue
        newer, older = sorted([(name, run), other], key=lambda entry: _date(entry[1].record), reverse=True)
        found[key] = newer
        problems.append(f"{older[0]}: the same run and seed as {newer[0]}, which is newer")
    return [run for _, run in found.values()], problems


def _read(path: Path, name: str) -> Run | None:
    """The run in a file; None when it holds something else; ValueError when it is damaged."""
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: is not JSON: {error}") from None
    if not isinstance(content, Mapping) or sum(mark in content for mark in _MARKS) < 3:
        return None
    record = check_result(in_todays_form(content, name), name)
    check_costs(record, name)
    return read_run(record, name)


def _with_predictions(run: Run, path: Path, name: str, problems: list[str]) -> Run:
    """The run and what it is right in, if there are predictions beside its record; those that do not fit are named."""
    file = predictions_of(path)
    if file is None:
        return run
    try:
        right = read_right(file).get(run.full, {})
    except ValueError as error:
        problems.append(one_line(f"{name}: {error}"))
        return run
    value, n = values_of(run.record).get(run.full), examples_of(run.record)
    if n != len(right) or value is None or abs(sum(right.values()) - n * value) > 1e-6 * n:
        problems.append(f"{name}: its predictions are not those of the record, with all of its experts")
        return run
    return dataclasses.replace(run, right=right)


def _date(record: Mapping[str, Any]) -> str:
    environment = record.get("environment")
    return str(environment.get("date", "")) if isinstance(environment, Mapping) else ""
