"""Fine-tuned models over their experts, kept or activated: the panels of Figure 4 and of pretrained encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from smoe.report.groups import plain
from smoe.report.panels import Line, Panel, Point, is_empty
from smoe.report.plots import Plot
from smoe.report.records import split_of, values_of
from smoe.report.runs import Cell, Context
from smoe.report.transfer import Column, Kind, Score, Tuned, complete


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
            return super().spread
        score = score_at(self.tuned, self.key if self.swept else None)
        low, high = score.interval
        return max(score.share - low, 0.0), max(high - score.share, 0.0)


def kept_plots(figure: str, columns: Iterable[Column], *, sweep_all: bool = False) -> list[Plot]:
    """One figure per scale, a panel per model, data set and setting; none without several numbers of experts.

    ``sweep_all``: see :func:`over_experts`.
    """
    panels: dict[str, list[Panel]] = {}
    for column in columns:
        if not is_empty(panel := over_experts(column, sweep_all)):
            panels.setdefault(column.scale, []).append(panel)
    return [Plot(figure, scale, [of_scale]) for scale, of_scale in panels.items()]


def over_experts(column: Column, sweep_all: bool = False) -> Panel:
    """One line per method over the experts that its task has voted for, all of them active, a training per point.

    A method that was fine-tuned only with all of its experts is shown over the k of that training; with ``sweep_all``
    every method is shown so too. Dense models are at the experts that make an MLP as wide as theirs. Word problems: of
    the same folds everywhere, see :func:`on_same_folds`.
    """
    (layers, width), most = column.standard
    tuned = [t for t in column.tuned.values() if t.kind.size[0] == layers]
    tuned = on_same_folds([t for t in tuned if t.kind.kept is None or column.is_standard(t.kind)])
    panel = Panel(column.name, _context(column, tuned), "experts, kept or activated", parameters=False)
    if most is None:
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
        name, whole = name_of(column, kind), of_line[0].kind.kept == kind.of
        over_kept = len(of_line) > 1 or not whole
        if over_kept:
            kept = [_point(one, one.kind.kept or 1, str(one.kind.kept)) for one in reversed(of_line)]
            panel.lines.append(Line(f"{name}, kept experts", kind.method, kept))
        keys = ks_of(of_line[0]) if whole and (sweep_all or not over_kept) else []
        if keys:
            swept = [_point(of_line[0], int(key), key, swept=True) for key in keys]
            panel.lines.append(Line(f"{name}, activated experts", "" if over_kept else kind.method, swept))
    return panel


def on_same_folds(tuned: Sequence[Tuned]) -> list[Tuned]:
    """With the same folds alone, so that points compare on the same problems.

    Those folds are taken with which most is shown, counted as points times folds; a seed that lacks one of them is left
    out. Without folds all stay as they are.
    """
    sets = {frozenset(one.folds(seed)) for one in tuned for seed in one.seeds}
    if not sets:
        return []
    sets |= {a & b for a in sets for b in sets if a & b}

    def on(folds: frozenset) -> list[Tuned]:
        runs = [
            {
                seed: {f: of_seed[f] for f in sorted(folds, key=str)}
                for seed, of_seed in one.runs.items()
                if folds <= of_seed.keys()
            }
            for one in tuned
        ]
        return [Tuned(one.kind, of_one) for one, of_one in zip(tuned, runs, strict=True) if of_one]

    return max(map(on, sorted(sets, key=lambda folds: sorted(map(str, folds)))), key=_shown)


def _shown(tuned: Sequence[Tuned]) -> tuple[int, int]:
    """Points times folds, and points."""
    return len(tuned) * len(tuned[0].folds(tuned[0].seeds[0])), len(tuned)


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


def _context(column: Column, tuned: Sequence[Tuned]) -> Context:
    """Named e.g. ``bert on mawps, scale cpu, setting all, 3 of 5 folds``."""
    some = complete(tuned[0], tuned[0].seeds[0]) if tuned else ""
    model, split = column.encoder or column.model, split_of(next(iter(column.tuned.values())).all_runs()[0].record)
    title = f"{model} on {column.dataset}, scale {column.scale}, setting {column.setting}" + (some and f", {some}")
    return Context(
        model, column.task, column.dataset, column.scale, {**column.metric, "split": plain(split)}, label=title
    )


def _point(tuned: Tuned, x: float, key: str, *, swept: bool = False) -> PooledPoint:
    return PooledPoint(x, Cell(tuned.all_runs()), key, swept, tuned)
