"""Fine-tuned models over their experts, kept or activated: the panels of Figure 4 and of pretrained encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import stdev

from smoe.report.groups import plain
from smoe.report.panels import Line, Panel, Point, is_empty
from smoe.report.plots import Plot
from smoe.report.records import split_of, values_of
from smoe.report.runs import Cell, Context
from smoe.report.transfer import DISTILLATION, FOLDS, Column, Kind, Score, Tuned


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
        score = score_at(self.tuned, self.key if self.swept else None)
        low, high = score.interval
        return max(score.share - low, 0.0), max(high - score.share, 0.0)


def kept_plots(figure: str, columns: Iterable[Column], *, sweep_all: bool = False) -> list[Plot]:
    """One figure per scale, a panel per model, data set and setting; none without several numbers of experts.

    ``sweep_all``: see :func:`over_experts`.
    """
    panels: dict[str, list[Panel]] = {}
    for column in columns:
        if column.task != DISTILLATION and not is_empty(panel := over_experts(column, sweep_all)):
            panels.setdefault(column.scale, []).append(panel)
    return [Plot(figure, scale, [of_scale]) for scale, of_scale in panels.items()]


def over_experts(column: Column, sweep_all: bool = False) -> Panel:
    """One line per method over the experts that its task has voted for, all of them active, a training per point.

    A method that was fine-tuned with all of its experts alone is shown over the k of that training; with ``sweep_all``
    every method is shown so too. Dense models are at the experts that make an MLP as wide as theirs. Of word problems
    the folds count that all of these runs have.
    """
    (layers, width), most = column.standard
    tuned = [t for t in column.tuned.values() if t.kind.size[0] == layers]
    tuned, folds = _on_shared_folds([t for t in tuned if t.kind.kept is None or column.is_standard(t.kind)])
    panel = Panel("over experts", _context(column, folds), "experts, kept or activated", parameters=False)
    if most is None or not tuned:
        return panel
    dense: dict[str, list[Point]] = {}
    for one in (one for one in tuned if one.kind.kept is None):
        point = _point(one, one.kind.size[1] * most / width, "dense")
        dense.setdefault(column.label(one.kind), []).append(point)
    for label, points in dense.items():
        panel.lines.append(Line(label, points[0].cell.first.method, sorted(points, key=lambda point: point.x)))
    lines: dict[Kind, list[Tuned]] = {}
    for one in most_experts_first(tuned):
        lines.setdefault(replace(one.kind, kept=None), []).append(one)
    for kind, of_line in lines.items():
        name, style = name_of(column, kind), kind.method
        if len(of_line) > 1 or of_line[0].kind.kept != kind.of:
            kept = [_point(one, one.kind.kept or 1, str(one.kind.kept)) for one in reversed(of_line)]
            panel.lines.append(Line(f"{name}, kept experts", style, kept))
            style = ""
        if of_line[0].kind.kept == kind.of and (style or sweep_all):
            swept = [_point(of_line[0], int(key), key, swept=True) for key in ks_of(of_line[0])]
            panel.lines.append(Line(f"{name}, activated experts", style, swept))
    return panel


def name_of(column: Column, kind: Kind) -> str:
    """Method, variant and how it was pretrained where that is not the method's way, without its number of experts."""
    adapted = f", pretrained with k = {kind.pretrained_k}" if kind.pretrained_k else ""
    return column.label(Kind(kind.method, options=kind.options)) + adapted


def most_experts_first(tuned: Iterable[Tuned]) -> list[Tuned]:
    """Those with experts, by method and variant, most kept experts first."""
    where = lambda kind: (kind.method, kind.options, kind.pretrained_k, -(kind.kept or 0))  # noqa: E731
    return sorted((one for one in tuned if one.kind.kept is not None), key=lambda one: where(one.kind))


def ks_of(tuned: Tuned) -> list[str]:
    """The k that all of its runs were measured at, ascending."""
    shared = set.intersection(*({*values_of(run.record)} for run in tuned.all_runs()))
    return sorted(shared, key=int)


def score_at(tuned: Tuned, key: str | None) -> Score:
    """Of the lowest seed; with ``key`` at so many activated experts."""
    return tuned.score(tuned.seeds[0], k=key)


def _on_shared_folds(tuned: Sequence[Tuned]) -> tuple[list[Tuned], list]:
    """With the folds alone that all of them have for every seed, so that lines are of the same problems; and these."""
    if not tuned:
        return [], []
    folds = sorted(set.intersection(*({*one.folds(seed)} for one in tuned for seed in one.seeds)), key=str)
    if not folds:
        return [], []
    runs = [{seed: {fold: one.runs[seed][fold] for fold in folds} for seed in one.seeds} for one in tuned]
    return [Tuned(one.kind, of_one) for one, of_one in zip(tuned, runs, strict=True)], folds


def _context(column: Column, folds: Sequence) -> Context:
    """Named e.g. ``bert on mawps, scale cpu, setting all, 3 of 5 folds``."""
    record = next(iter(column.tuned.values())).all_runs()[0].record
    some = len(folds) < FOLDS and column.setting == "all" and folds not in ([], [None])
    title = f"{column.encoder or column.model} on {column.dataset}, scale {column.scale}, setting {column.setting}"
    title += f", {len(folds)} of {FOLDS} folds" if some else ""
    metric = {**column.metric, "split": plain(split_of(record))}
    return Context(column.encoder or column.model, column.task, column.dataset, column.scale, metric, label=title)


def _point(tuned: Tuned, x: float, key: str, *, swept: bool = False) -> PooledPoint:
    return PooledPoint(x, Cell(tuned.all_runs()), key, swept, tuned)
