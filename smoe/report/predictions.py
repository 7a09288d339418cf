"""Whether runs are right, example by example: read from beside their records, and compared.

python -m smoe.report --compare RUN_A RUN_B [--k 16] [--json]
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from smoe.json_files import parse_json
from smoe.report.groups import plain
from smoe.report.markdown import p_value
from smoe.report.records import Record, check_result, dataset_name, read_result, split_of, value_at, values_of
from smoe.report.statistics import mcnemar, paired_bootstrap, wilson_interval

IN_RUN_FOLDER, BESIDE_RECORD = "predictions.jsonl", ".predictions.jsonl.gz"
_MOST_BYTES = 100_000_000  # of a file, unpacked


def predictions_of(record: Path) -> Path | None:
    """The file with the predictions of a run folder or of a record, ``NAME.json``; None if there is none."""
    if record.is_dir() or record.name == "result.json":
        file = (record if record.is_dir() else record.parent) / IN_RUN_FOLDER
    else:
        file = record.with_suffix(BESIDE_RECORD)
    return file if file.is_file() else None


def read_right(file: Path) -> Mapping[str, Mapping[str, bool]]:
    """By k as text (or ``dense``), then by the example's name: whether the run is right.

    ValueError in one line when the file is damaged.
    """
    found: dict[str, dict[str, bool]] = {}
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        for text in content.splitlines():
            line = parse_json(text)
            name = line["id"]
            if not isinstance(name, str) or any(name in of_k for of_k in found.values()):
                raise ValueError(f"id {str(name)[:50]!r} is no text, or is there twice")
            for k, (_, right) in ((k, said) for k, said in line.items() if k != "id"):
                if right not in (0, 1):
                    raise ValueError(f"{str(right)[:50]!r} is not 0 or 1")
                found.setdefault(k, {})[name] = bool(right)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise ValueError(f"predictions: {file} is damaged ({error})") from None
    if not found or len({frozenset(of_k) for of_k in found.values()}) != 1:
        raise ValueError(f"predictions: {file} is damaged (it has no examples, or not the same ones at every k)")
    return found


@dataclass(frozen=True)
class Paired:
    """Two runs on the same ``n`` examples.

    Attributes:
        a, b: how many each has right. only_a, only_b: right where the other is wrong.
        low, high: bootstrap interval of a/n - b/n. p: of McNemar's exact test.
    """

    n: int
    a: int
    b: int
    only_a: int
    only_b: int
    low: float
    high: float
    p: float

    @property
    def difference(self) -> float:
        """The share that ``a`` has right minus that of ``b``."""
        return (self.a - self.b) / self.n


def compare_right(a: Mapping[Any, bool], b: Mapping[Any, bool]) -> Paired:
    """Two models by example. ValueError unless both have the same examples, two at least."""
    if a.keys() != b.keys():
        raise ValueError(f"the runs have {len(a)} and {len(b)} examples, {len(a.keys() & b.keys())} of them the same")
    return _paired(tuple(a.values()), tuple(b[name] for name in a))


@cache
def _paired(a: tuple[bool, ...], b: tuple[bool, ...]) -> Paired:
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    return Paired(len(a), sum(a), sum(b), only_a, only_b, *paired_bootstrap(a, b), mcnemar(a, b))


def compare_runs(paths: tuple[str, str], ks: tuple[str | None, str | None]) -> dict[str, Any]:
    """The comparison of two finished runs as data: run folders or records with predictions beside them.

    Args:
        ks: what each is read at, ``dense`` or a number as text; None: all of its experts.

    Raises ValueError when a run has no predictions, was not measured at that k, or is of other examples.
    """
    sides, rights = [], []
    for path, k in zip(paths, ks, strict=True):
        record = check_result(read_result(path), path)
        key = k or max(values_of(record), key=lambda key: (key == "dense", int(key) if key != "dense" else 0))
        file = predictions_of(Path(path))
        if file is None:
            raise ValueError(f"run: {path} has no predictions beside it; {IN_RUN_FOLDER}, or NAME{BESIDE_RECORD}")
        right = read_right(file).get(key)
        if right is None or value_at(record, key) is None:
            raise ValueError(f"k is {key}; {path} was measured at {', '.join(read_right(file))}")
        low, high = wilson_interval(sum(right.values()), len(right))
        side = {"run": path, "method": record["method"], "k": key, "right": sum(right.values())}
        sides.append(side | {"share": sum(right.values()) / len(right), "low": low, "high": high})
        rights.append((record, right))
    (record_a, a), (record_b, b) = rights
    for what, one, other in zip(("data", "fold", "split"), examples_key(record_a), examples_key(record_b), strict=True):
        if one != other:
            raise ValueError(f"the runs are of different examples: {what} is {plain(one)} and {plain(other)}")
    paired = compare_right(a, b)
    return {**vars(paired), "difference": paired.difference, "a": sides[0], "b": sides[1]}


def examples_key(record: Record) -> tuple[Any, Any, str]:
    """What decides which examples a run is measured on: the data, the fold, the split."""
    dataset = record["dataset"]
    sha256 = dataset.get("sha256") if isinstance(dataset, Mapping) else None
    return f"{dataset_name(record)} {sha256}", record.get("fold"), split_of(record)


def comparison_text(found: Mapping[str, Any]) -> str:
    """What ``--compare`` prints."""
    lines = []
    for name in ("a", "b"):
        side = found[name]
        at = "" if side["k"] == "dense" else f", k = {side['k']}"
        share = f"{side['right']} of {found['n']} right, {100 * side['share']:.2f} %"
        lines.append(f"{name}: {plain(side['run'], 200)} ({side['method']}{at}): {share}"
                     f" ({100 * side['low']:.2f} to {100 * side['high']:.2f})")  # fmt: skip
    lines.append(f"only a is right {found['only_a']} times, only b {found['only_b']} times")
    interval = f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}"
    lines.append(f"a - b: {100 * found['difference']:+.2f} points, paired bootstrap {interval}")
    p = p_value(found["p"])
    lines.append(f"McNemar's exact test: p {'' if p.startswith('<') else '= '}{p}")
    return "\n".join(lines)
