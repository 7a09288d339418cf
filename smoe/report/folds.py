"""The folds of a set of word problems as one run: every problem is tested once, by the training that did not see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from smoe.report.records import Record, dataset_name, examples_of, split_of, value_at, values_of
from smoe.report.runs import Run
from smoe.report.transfer import setting_of


def over_folds(runs: Iterable[Run]) -> list[Run]:
    """The runs, where those of setting `all` that differ in their fold alone are one run.

    Of the folds of a data set only those count that every run to compare has, so that lines of a figure are of the same
    problems; where there is no such fold, none of these runs is left. The condition ``folds`` names them, e.g. ``0 1``.
    """
    alone, places = [], {}
    for run in runs:
        if setting_of(run) != "all" or run.record.get("fold") is None:
            alone.append(run)
            continue
        rest = tuple((name, value) for name, value in run.conditions if name not in ("fold", "n"))
        where = (run.record["model"], dataset_name(run.record), run.record["scale"], rest)
        key = (replace(run, conditions=rest).identity, run.seed)
        places.setdefault(where, {}).setdefault(key, {})[str(run.record["fold"])] = run
    for (*_, rest), groups in places.items():
        folds = sorted(set.intersection(*(set(by_fold) for by_fold in groups.values())))
        if folds:
            conditions = (*rest, ("folds", " ".join(folds)))
            alone += [_as_one([by_fold[fold] for fold in folds], conditions) for by_fold in groups.values()]
    return alone


def _as_one(runs: Sequence[Run], conditions: tuple[tuple[str, str], ...]) -> Run:
    """``runs``: the same training on each of several folds."""
    record, split = runs[0].record, split_of(runs[0].record)
    counts = [examples_of(run.record) or 0 for run in runs]
    keys = [key for key in values_of(record) if all(key in values_of(run.record) for run in runs)]

    def mean(value: Callable[[Record, str], float | None], key: str) -> float:
        return sum(n * (value(run.record, key) or 0) for n, run in zip(counts, runs, strict=True)) / sum(counts)

    def metrics(values: Mapping[str, float]) -> dict:
        shown = record["metrics"][record["metric"]]
        kept = {name: shown[name] for name in ("title", "unit", "direction")}
        return {record["metric"]: {**kept, "n": {split: sum(counts)}, split: values}}

    at_k = {key: mean(value_at, key) for key in keys if key != "dense"}
    return replace(
        runs[0],
        record={
            **record,
            "metrics": metrics({key: mean(lambda r, k: values_of(r)[k], key) for key in keys}),
            "best_at_other_k": [{"k": int(key), "metrics": metrics({key: value})} for key, value in at_k.items()],
        },
        conditions=conditions,
        right=None,
    )
