"""An encoder that somebody else has pretrained (docs/pretrained.md): its plot and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from smoe.report.groups import plain
from smoe.report.markdown import MISSING, md, number, table, text_table
from smoe.report.panels import Line, Panel, Point, is_empty
from smoe.report.plots import Plot
from smoe.report.records import parameters_at, split_of, values_of
from smoe.report.runs import Cell, Context
from smoe.report.transfer import SETTINGS, Column, Kind, Score, Tuned, complete
from smoe.report.transfer_tables import examples, over_seeds, span, to_dense

_TEXT = """## A pretrained encoder

Not in the paper: a dense encoder that knows something already, cut into experts, adapted to text without labels while k
grows, and fine-tuned, as [docs/pretrained.md](../docs/pretrained.md) tells; the dense one took the same steps. Fewer
experts, all of them activated, are those that the task's training data voted for before fine-tuning: each a training of
its own. The rows with fewer activated ones are of one training with all experts. Intervals as for Table 2. Parameters
are those that a token uses. Megabytes are those of the weights as a file in fp32, milliseconds those of an example in
batches as the run evaluates them, all models in turns on one machine."""

_HEAD = ["method", "experts", "activated", "ours", "95 %", "n", "to dense", "95 %", "p", "over seeds"]
_HEAD += ["parameters", "MB", "ms"]
# Of encoder_text: the cells that it shows -> their heads.
_PICKED = {name: name for name in ("method", "experts", "activated", "n", "ours", "to dense")}
_PICKED |= {"95 % of the difference": "95 %", "MB": "MB", "ms": "ms"}


@dataclass(frozen=True)
class PooledPoint(Point):
    """A point whose values are those of ``tuned``, its folds pooled; with ``swept`` at ``key`` activated experts."""

    tuned: Tuned | None = None

    @property
    def values(self) -> list[float]:
        assert self.tuned is not None
        return self.tuned.values(self.key if self.swept else None)

    @property
    def spread(self) -> tuple[float, float]:
        """The standard deviation over the seeds; of one seed the Wilson interval."""
        assert self.tuned is not None
        if len(self.values) > 1:
            return stdev(self.values), stdev(self.values)
        score = _score(self.tuned, self.key if self.swept else None)
        low, high = score.interval
        return max(score.share - low, 0.0), max(high - score.share, 0.0)


def encoder_plots(columns: Sequence[Column]) -> list[Plot]:
    """One figure per scale, a panel per encoder and task; none without several numbers of experts."""
    panels = {}
    for column in filter(_routed, columns):
        if not is_empty(panel := _panel(column)):
            panels.setdefault(column.scale, []).append(panel)
    return [Plot("encoder", scale, [of_scale]) for scale, of_scale in panels.items()]


def encoder_parts(
    columns: Sequence[Column], plots: Sequence[Plot], times: Sequence[dict[str, Any]], figures: str
) -> list[str]:
    """The section.

    Args:
        times: rows of ``encoder_times.json``. figures: the folder of the plots as seen from the document.
    """
    if not columns:
        return [_TEXT, "Not run; `bash script/pretrained/all.sh` does."]
    parts = [_TEXT]
    for plot in (plot for plot in plots if plot.figure == "encoder"):
        parts.append(f"![A pretrained encoder, scale {md(plot.scale)}]({figures}/{plot.stem}.png)")
    for column in columns:
        parts += [f"### {md(column.name)}, scale {md(column.scale)}, {SETTINGS[column.setting]}"]
        parts.append(table(_HEAD, _rows(column, times)))
    return parts


def encoder_text(columns: Sequence[Column], times: Sequence[dict[str, Any]]) -> str:
    """The tables of the section as plain text, with fewer columns; a line where there is none."""
    blocks = []
    for column in columns:
        cells = [_cells(column, tuned, key, times) for tuned, key in _tuned_rows(column)]
        for row in cells:
            row["ours"] = row["over seeds"] if "±" in row["over seeds"] else row["ours"]
        said = "mean ± deviation over seeds" if any("±" in row["ours"] for row in cells) else "one seed"
        head = f"{_title(column)}: {column.metric['title'].lower()}, {said}, %"
        rows = [[*_PICKED.values()], *([row[name] for name in _PICKED] for row in cells)]
        blocks.append("\n".join([head, "", *text_table(rows)]))
    return "\n\n".join(blocks) or "Not run."


def _rows(column: Column, times: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [_cells(column, tuned, key, times) for tuned, key in _tuned_rows(column)]
    return [[md(row.pop("method")), *row.values()] for row in rows]


def _title(column: Column) -> str:
    return f"{column.name}, scale {column.scale}, setting {column.setting}"


def _tuned_rows(column: Column) -> list[tuple[Tuned, str | None]]:
    """What the rows show: a training, and the number of activated experts where not all that there are."""
    rows: list[tuple[Tuned, str | None]] = [(tuned, None) for kind, tuned in column.tuned.items() if kind.kept is None]
    rows += [(tuned, None) for tuned in _routed(column)]
    for tuned in _routed(column):
        if tuned.kind.kept == tuned.kind.of:
            rows += [(tuned, key) for key in reversed(_ks(tuned)) if int(key) != tuned.kind.kept]
    return rows


def _cells(column: Column, tuned: Tuned, key: str | None, times: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A row, in the order of ``_HEAD``."""
    kind, score = tuned.kind, _score(tuned, key)
    record = tuned.all_runs()[0].record
    k = kind.kept if key is None else int(key)
    difference, interval, p = to_dense(column, tuned) if key is None else ["-"] * 3
    megabytes, milliseconds = _costs(column, kind, k, times)
    return {
        "method": _name(column, kind),
        "experts": "-" if kind.kept is None else str(kind.kept),
        "activated": "-" if k is None else str(k),
        "ours": f"{100 * score.share:.2f}",
        "95 %": span(*score.interval),
        "n": examples(tuned),
        "to dense": difference,
        "95 % of the difference": interval,
        "p": p,
        "over seeds": over_seeds(tuned.values(key)),
        "parameters": f"{parameters_at(record, 'dense' if k is None else str(k)):,.0f}",
        "MB": megabytes,
        "ms": milliseconds,
    }


def _costs(column: Column, kind: Kind, k: int | None, times: Sequence[dict[str, Any]]) -> list[str]:
    """Megabytes and milliseconds."""
    found = next((row for row in times if _is_of(row, column, kind, k)), {})
    return [number(found[name], 2) if name in found else MISSING for name in ("megabytes", "milliseconds")]


def _name(column: Column, kind: Kind) -> str:
    """Without its number of experts."""
    adapted = f", pretrained with k = {kind.pretrained_k}" if kind.pretrained_k else ""
    return column.label(Kind(kind.method, options=kind.options)) + adapted


def _is_of(row: dict[str, Any], column: Column, kind: Kind, k: int | None) -> bool:
    mine = (column.encoder, column.dataset, column.scale, kind.method, kind.kept, k)
    return tuple(row.get(name) for name in ("encoder", "dataset", "scale", "method", "experts", "k")) == mine


def _panel(column: Column) -> Panel:
    record = column.tuned[next(iter(column.tuned))].all_runs()[0].record
    title = f"{column.name}, scale {column.scale}, setting {column.setting}"
    place = (column.encoder, column.task, column.dataset, column.scale)
    context = Context(*place, {**column.metric, "split": plain(split_of(record))}, label=title)
    panel = Panel(title, context, "experts: kept, or activated of one training", parameters=False)
    routed = _routed(column)
    most = max(tuned.kind.of or 1 for tuned in routed)
    whole = lambda tuned: not any(complete(tuned, seed) for seed in tuned.seeds)  # noqa: E731
    for tuned in (tuned for kind, tuned in column.tuned.items() if kind.kept is None and whole(tuned)):
        panel.lines.append(Line(column.label(tuned.kind), tuned.kind.method, [_point(tuned, most, "dense")]))
    lines: dict[tuple, list[Tuned]] = {}
    for tuned in filter(whole, routed):
        kind = tuned.kind
        lines.setdefault((kind.method, kind.of, kind.options, kind.pretrained_k), []).append(tuned)
    for (method, *_), of_line in lines.items():
        name = _name(column, of_line[0].kind)
        kept = [_point(tuned, tuned.kind.kept or 1, str(tuned.kind.kept)) for tuned in reversed(of_line)]
        if len(kept) > 1 or of_line[0].kind.kept != of_line[0].kind.of:
            panel.lines.append(Line(f"{name}, kept experts", method, kept))
        for tuned in (tuned for tuned in of_line if tuned.kind.kept == tuned.kind.of):
            points = [_point(tuned, int(key), key, swept=True) for key in _ks(tuned)]
            panel.lines.append(Line(f"{name}, activated of one training", "", points))
    return panel


def _point(tuned: Tuned, x: int, key: str, *, swept: bool = False) -> PooledPoint:
    return PooledPoint(x, Cell(tuned.all_runs()), key, swept, tuned)


def _routed(column: Column) -> list[Tuned]:
    """Those with experts, most of them first."""
    routed = [tuned for kind, tuned in column.tuned.items() if kind.kept is not None]
    where = lambda kind: (kind.method, kind.options, kind.pretrained_k, -(kind.kept or 0))  # noqa: E731
    return sorted(routed, key=lambda tuned: where(tuned.kind))


def _ks(tuned: Tuned) -> list[str]:
    """The k that all of its runs were measured at, ascending."""
    shared = set.intersection(*({*values_of(run.record)} for run in tuned.all_runs()))
    return sorted(shared, key=int)


def _score(tuned: Tuned, key: str | None) -> Score:
    """Of the lowest seed."""
    return tuned.score(tuned.seeds[0], k=key)
