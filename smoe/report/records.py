"""Records of finished runs: read, checked, and in today's form whichever version wrote them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoe.json_files import load_json
from smoe.metrics import BITS_PER_MASKED_TOKEN, BPC

Record = Mapping[str, Any]

# Until metrics had names, every record held its values under "bpc", whatever the model was measured in.
_METRIC_OF_OLD = {
    "transformer_xl": ("language_model", BPC),
    "bert": ("masked_lm", BITS_PER_MASKED_TOKEN),
    "roberta": ("masked_lm", BITS_PER_MASKED_TOKEN),
}


def read_result(path: str | Path) -> Record:
    """The record in a run folder or in a JSON file, in today's form. ValueError in one line when there is none."""
    path = Path(path)
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"run: {file} does not exist; a run writes it when it finishes")
    try:
        record = load_json(file)
    except ValueError as error:
        raise ValueError(f"run: {file} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"run: {file} holds a {type(record).__name__}; it must be a JSON object")
    return in_todays_form(record, str(path))


def in_todays_form(record: Record, name: str = "result") -> Record:
    """A record of an earlier version, with ``bpc`` and ``best_bpc``, as today's version writes it; others unchanged.

    ValueError naming ``name`` when the model is not one of those that had such records.
    """
    if "metrics" in record or "bpc" not in record:
        return record
    model, bpc, best = record.get("model"), record["bpc"], record.get("best")
    if model not in list(_METRIC_OF_OLD):
        raise ValueError(
            f"{name}: model is {reprlib.repr(model)}; with bpc it must be one of {', '.join(_METRIC_OF_OLD)}"
        )
    if not isinstance(bpc, Mapping):
        raise ValueError(f"{name}: bpc is {reprlib.repr(bpc)}; it must hold valid and test")
    task, metric = _METRIC_OF_OLD[model]
    splits = {split: bpc[split] for split in ("valid", "test") if split in bpc}
    renamed: dict[str, Any] = {"task": task, "metric": metric.key}
    renamed["metrics"] = {metric.key: {**metric.shown_as, **splits}}
    if isinstance(best, Mapping) and "best_step" in best:
        value, valid = best.get("best_bpc"), bpc.get("valid")
        ks = [k for k, measured in valid.items() if measured == value] if isinstance(valid, Mapping) else []
        k = int(ks[-1]) if ks and ks[-1].isdecimal() else None
        renamed["best"] = {"step": best["best_step"], "metric": metric.key, "value": value, "k": k}
    return {field: content for field, content in record.items() if field != "bpc"} | renamed


def check_result(record: Record, name: str = "result") -> Record:
    """The record in today's form, if a table and a plot can be made of it.

    ValueError in one line, naming ``name``, the field and what it must be, if they can't.
    """
    record = in_todays_form(record, name)
    for field in ("model", "method", "scale", "dataset", "parameters", "metric", "metrics"):
        if field not in record:
            raise ValueError(f"{name}: {field} is missing")
    for field in ("model", "method", "scale", "metric"):
        _check(isinstance(record[field], str), record[field], f"{name}: {field}", "text")
    metric = record["metric"]  # a part of names and messages from here on
    _check(metric.isprintable(), metric, f"{name}: metric", "printable text")
    where = f"{name}: dataset.name" if isinstance(record["dataset"], Mapping) else f"{name}: dataset"
    _check(isinstance(dataset_name(record), str), dataset_name(record), where, "text")
    for field, kind, words in (("label", str, "text"), ("seed", int, "a whole number"), ("config", Mapping, "fields")):
        value = record.get(field)
        _check(
            value is None or isinstance(value, kind) and not isinstance(value, bool), value, f"{name}: {field}", words
        )
    _check(isinstance(record["metrics"], Mapping), record["metrics"], f"{name}: metrics", "metrics by name")
    _check_metric(record, f"{name}: metrics.{metric}")
    _check_parameters(record, name)
    _check_other_checkpoints(record, name)
    return record


def dataset_name(record: Record) -> Any:
    """What the record calls its data."""
    dataset = record["dataset"]
    return dataset.get("name") if isinstance(dataset, Mapping) else dataset


def split_of(record: Record) -> str:
    """The split that reports go by: ``test``, or ``valid`` where the deciding metric has no test split."""
    return "test" if record["metrics"][record["metric"]].get("test") else "valid"


def values_of(record: Record) -> Mapping[str, float]:
    """The deciding metric on that split, by k as text (or ``dense``)."""
    return record["metrics"][record["metric"]][split_of(record)]


def value_at(record: Record, key: str) -> float | None:
    """The deciding metric at this k, of the checkpoint that was chosen at this k if there is one; None if not measured.

    SMoE and THOR are chosen at the k that they are trained with. A run that also chose a checkpoint at k = N has that
    one's values under ``best_at_other_k``; methods are compared at k = N by those.
    """
    for best in record.get("best_at_other_k") or ():
        if str(best["k"]) == key and "metrics" in best:
            value = best["metrics"][record["metric"]][split_of(record)].get(key)
            if value is not None:
                return value
    return values_of(record).get(key)


def parameters_at(record: Record, key: str) -> float:
    """Parameters that one token uses at this k."""
    parameters = record["parameters"]
    return parameters["total"] if key == "dense" else parameters["active_per_k"][key]


def examples_of(record: Record) -> int | None:
    """n: how many examples those values are means over; None where the record does not say."""
    return (record["metrics"][record["metric"]].get("n") or {}).get(split_of(record))


def _check_metric(record: Record, name: str) -> None:
    metric = record["metrics"].get(record["metric"])
    if metric is None:
        raise ValueError(f"{name} is missing, the metric that decides")
    _check(isinstance(metric, Mapping), metric, name, "a metric")
    for field in ("title", "unit"):
        _check(isinstance(metric.get(field), str) and metric[field], metric.get(field), f"{name}.{field}", "text")
    direction = metric.get("direction")
    _check(direction in ("lower", "higher"), direction, f"{name}.direction", "lower or higher")
    if not metric.get("test") and "valid" not in metric:
        raise ValueError(f"{name} has neither test nor valid; it must have a number for each k, or for 'dense'")
    split = split_of(record)
    values = metric[split]
    proper = isinstance(values, Mapping) and len(values) > 0
    _check(proper, values, f"{name}.{split}", "a number for each k, or for 'dense'")
    for key, value in values.items():
        if key != "dense" and not (isinstance(key, str) and re.fullmatch("[1-9][0-9]{0,5}", key)):
            raise ValueError(f"{name}.{split} has key {reprlib.repr(key)}; it must be a number of experts or 'dense'")
        _check_number(value, f"{name}.{split}.{key}")
    n = metric.get("n")
    _check(n is None or isinstance(n, Mapping), n, f"{name}.n", "a number for each split")
    count = examples_of(record)
    whole = isinstance(count, int) and not isinstance(count, bool) and count > 0
    _check(count is None or whole, count, f"{name}.n.{split}", "a whole number of at least 1")


def _check_other_checkpoints(record: Record, name: str) -> None:
    others = record.get("best_at_other_k")
    _check(others is None or isinstance(others, list), others, f"{name}: best_at_other_k", "a list of checkpoints")
    for number, best in enumerate(others or ()):
        where = f"{name}: best_at_other_k.{number}"
        proper = isinstance(best, Mapping) and isinstance(best.get("k"), int)
        _check(proper, best, where, "a checkpoint with the k that it was chosen at")
        if "metrics" in best:
            metrics, split = best["metrics"], split_of(record)
            found = metrics.get(record["metric"]) if isinstance(metrics, Mapping) else None
            values = found.get(split) if isinstance(found, Mapping) else None
            where = f"{where}.metrics.{record['metric']}.{split}"
            _check(isinstance(values, Mapping), values, where, "a number for each k")
            for key, value in values.items():
                _check_number(value, f"{where}.{key}")


def _check_parameters(record: Record, name: str) -> None:
    parameters = record["parameters"]
    if not isinstance(parameters, Mapping) or "total" not in parameters:
        raise ValueError(f"{name}: parameters.total is missing")
    _check_number(parameters["total"], f"{name}: parameters.total")
    active = parameters.get("active_per_k", {})
    for key in values_of(record):
        if key == "dense":
            continue
        if not isinstance(active, Mapping) or key not in active:
            where = f"metrics.{record['metric']}.{split_of(record)}"
            raise ValueError(f"{name}: parameters.active_per_k.{key} is missing, while {where} has k = {key}")
        _check_number(active[key], f"{name}: parameters.active_per_k.{key}")


def _check_number(value: Any, name: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _check(number and abs(value) < 1e300, value, name, "a number")  # NaN and infinity aren't


def _check(right: bool, value: Any, name: str, words: str) -> None:
    if not right:
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be {words}")
