"""What each table and figure of the paper shows: which runs, as which lines, over what.

Runs are chosen by what their records say, never by where they lie; one run may serve several panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import stdev

from smoe.methods import METHODS
from smoe.report.records import values_of
from smoe.report.runs import Cell, Context, Run, cells_of, variant_names

PRETRAINING = ("language_model", "masked_lm")
DENSE, OURS = "dense_dropout", "smoe_dropout"
ROUTERS = {"random": "fixed random router", "uniform": "uniform random routing", "hash": "token-id hash",
           "learned": "learned router"}  # fmt: skip
POSITIONS = ("all", "early", "middle", "later", "every-2")


@dataclass(frozen=True)
class Point:
    """One place on a line: ``x`` in the unit of the panel's axis, the runs there, and the k that they are read at.

    ``swept``: the line is one checkpoint at several k; else each k has the checkpoint that was chosen at it.
    """

    x: float
    cell: Cell
    key: str
    swept: bool = False

    @property
    def values(self) -> list[float]:
        """The metric, one value per seed."""
        return list((self.cell.swept(self.key) if self.swept else self.cell.at(self.key)).values())

    @property
    def spread(self) -> tuple[float, float]:
        """How far an error bar goes below and above the mean: the standard deviation over the seeds; 0 for one."""
        return (stdev(self.values),) * 2 if len(self.values) > 1 else (0.0, 0.0)


@dataclass(frozen=True)
class Line:
    """``style`` names the method; a line that departs from its router, layers or schedule has none."""

    label: str
    style: str
    points: list[Point]

    @property
    def variant(self) -> str:
        """In which other options it departs from the method as released."""
        return self.points[0].cell.first.variant


@dataclass
class Panel:
    """One set of axes. ``letter``: of Figure 5; ``parameters``: whether x is active parameters in millions."""

    title: str
    context: Context
    x_label: str
    lines: list[Line] = field(default_factory=list)
    parameters: bool = True


def table1(context: Context) -> list[tuple[str, Cell]]:
    """The rows of Table 1, methods as they are, in the paper's order, each with its label; variants follow each."""
    cells = cells_of(run for run in context.runs if _plain(context, run))
    rows = zip(cells, _labels(cells), strict=True)
    return [(label, cell) for cell, label in sorted(rows, key=lambda row: list(METHODS).index(row[0].first.method))]


def figure1(context: Context) -> Panel:
    """SMoE-Dropout and learnable SMoE over k, and dense models of several widths."""
    panel = Panel("Figure 1", context, "active parameters (million)")
    panel.lines = [*_dense(context, [DENSE]), *_sweeps(context, ["smoe", OURS])]
    return panel


def figure3(context: Context) -> Panel:
    """Every method over its active parameters."""
    panel = Panel("Figure 3", context, "active parameters (million)")
    dense = [name for name, method in METHODS.items() if not method.routed]
    panel.lines = [*_dense(context, dense), *_sweeps(context, [name for name in METHODS if name not in dense])]
    return panel


def figure5a(context: Context) -> Panel:
    """Depth: k = N over the number of layers."""
    panel = Panel("(a) depth", context, "transformer layers", parameters=False)
    _, d_hidden, num_experts = context.standard
    runs = [r for r in context.runs if r.d_hidden == d_hidden and r.num_experts in (None, num_experts) and _as_is(r)]
    panel.lines = _over_sizes(runs, lambda run: run.num_layers)
    return panel


def figure5b(context: Context) -> Panel:
    """Width: k = N over the number of experts of one width; a dense MLP is as wide as all of them."""
    panel = Panel("(b) width", context, "experts (dense: an MLP as wide)", parameters=False)
    num_layers, d_hidden, num_experts = context.standard
    if num_experts is None:
        return panel
    width = d_hidden // num_experts
    runs = [r for r in context.runs if r.num_layers == num_layers and r.d_hidden % width == 0 and _as_is(r)]
    runs = [run for run in runs if run.num_experts in (None, run.d_hidden // width)]
    experts = {run.d_hidden // width for run in runs if run.num_experts is not None}
    panel.lines = _over_sizes(
        [run for run in runs if run.d_hidden // width in experts], lambda run: run.d_hidden // width
    )
    return panel


def figure5c(context: Context) -> Panel:
    """Routing of SMoE-Dropout: fixed random, uniform random, hash of the token id."""
    panel = Panel("(c) routing", context, "active parameters (million)")
    runs = [r for r in _smoe_dropout(context) if r.own_schedule and r.all_layers]
    panel.lines = _variants(runs, lambda run: ROUTERS.get(run.router or "", str(run.router)))
    return panel


def figure5d(context: Context) -> Panel:
    """SMoE-Dropout with and without growing k; other schedules beside."""
    panel = Panel("(d) schedule of k", context, "active parameters (million)")
    runs = [r for r in _smoe_dropout(context) if r.own_router and r.all_layers]
    panel.lines = _variants(runs, schedule_name)
    return panel


def figure5e(context: Context) -> Panel:
    """Which layers have experts."""
    panel = Panel("(e) layers with experts", context, "active parameters (million)")
    runs = [r for r in _smoe_dropout(context) if r.own_router and r.own_schedule]
    panel.lines = _variants(runs, position_name)
    return panel


def beyond(context: Context) -> Panel:
    """Not in the paper's figure: other schedules with a learned router (section A2.2 has the growing one)."""
    panel = Panel("beyond: learned router, schedule of k", context, "active parameters (million)")
    runs = [r for r in context.runs if r.method == "smoe" and context.is_standard(r) and r.own_router and r.all_layers]
    panel.lines = _variants(runs, schedule_name)
    return panel


FIGURE5: dict[str, Callable[[Context], Panel]] = {
    "figure5a": figure5a,
    "figure5b": figure5b,
    "figure5c": figure5c,
    "figure5d": figure5d,
    "figure5e": figure5e,
    "beyond": beyond,
}


def schedule_name(run: Run) -> str:
    """E.g. ``growing, k = 8..16`` or ``k = 16 throughout``."""
    assert run.schedule is not None
    k_min, k_max, mode = run.schedule
    if mode == "constant":
        return f"k = {k_max} throughout"
    return f"{'growing' if mode == 'linear' else mode.replace('_', ' ')}, k = {k_min}..{k_max}"


def position_name(run: Run) -> str:
    """The name of the layers that have experts, else their indices."""
    from smoe.modulize.layers import chosen_layers

    for name in POSITIONS:
        if tuple(chosen_layers(name, run.num_layers)) == run.layers:
            return name
    return "layers " + " ".join(map(str, run.layers))


def is_empty(panel: Panel) -> bool:
    """Whether the panel compares nothing: fewer than two lines, or one point on each of several sizes."""
    if panel.parameters:
        return len(panel.lines) < 2
    return len({point.x for line in panel.lines for point in line.points}) < 2


def _as_is(run: Run) -> bool:
    """Whether the run has its method's own router and schedule, and experts in every layer."""
    return run.own_router and run.own_schedule and run.all_layers


def _plain(context: Context, run: Run) -> bool:
    return context.is_standard(run) and _as_is(run)


def _smoe_dropout(context: Context) -> list[Run]:
    return [run for run in context.runs if run.method == OURS and context.is_standard(run)]


def _labels(cells: Sequence[Cell]) -> list[str]:
    """Method and, where there are several variants of it, in which options it departs."""
    names = variant_names(cells)
    return [METHODS[c.first.method].title + (f", {name}" if name else "") for c, name in zip(cells, names, strict=True)]


def _dense(context: Context, methods: Sequence[str]) -> list[Line]:
    """One line per dense method, whose points are trainings of their own: one per width."""
    lines = []
    for method in methods:
        runs = [run for run in context.runs if run.method == method and run.num_layers == context.standard[0]]
        points = [Point(cell.first.record["parameters"]["total"] / 1e6, cell, "dense") for cell in cells_of(runs)]
        if points:
            lines.append(Line(METHODS[method].title, method, sorted(points, key=lambda point: point.x)))
    return lines


def _sweeps(context: Context, methods: Sequence[str]) -> list[Line]:
    """One line per kind of run of these methods, over the k of one training."""
    cells = cells_of(run for run in context.runs if _plain(context, run) and run.method in methods)
    return [_sweep(cell, label, cell.first.method) for cell, label in zip(cells, _labels(cells), strict=True)]


def _sweep(cell: Cell, label: str, style: str) -> Line:
    parameters = cell.first.record["parameters"]
    keys = sorted(values_of(cell.first.record), key=lambda key: parameters["active_per_k"][key])
    return Line(label, style, [Point(parameters["active_per_k"][key] / 1e6, cell, key, swept=True) for key in keys])


def _variants(runs: Sequence[Run], name: Callable[[Run], str]) -> list[Line]:
    """One line per kind of run, named by ``name``; only options of the method for which ``name`` varies."""
    names_of: dict[tuple, set[str]] = {}
    for run in runs:
        names_of.setdefault(run.options, set()).add(name(run))
    cells = cells_of(run for run in runs if len(names_of[run.options]) > 1)
    names = [name(c.first) + (f", {v}" if v else "") for c, v in zip(cells, variant_names(cells), strict=True)]
    lines = [_sweep(c, label, c.first.method if _as_is(c.first) else "") for c, label in zip(cells, names, strict=True)]
    return sorted(lines, key=lambda line: not line.style)


def _over_sizes(runs: Iterable[Run], x: Callable[[Run], int]) -> list[Line]:
    """One line per method and variant of dense, SMoE and SMoE-Dropout, at k = N, over a size."""
    lines: dict[tuple, list[Point]] = {}
    for cell in cells_of(run for run in runs if run.method in (DENSE, "smoe", OURS)):
        point = Point(x(cell.first), cell, cell.first.full)
        lines.setdefault((cell.first.method, cell.first.options), []).append(point)
    sized = {key: sorted(points, key=lambda point: point.x) for key, points in lines.items()}
    labels = _labels([points[0].cell for points in sized.values()])
    return [Line(label, key[0], points) for label, (key, points) in zip(labels, sized.items(), strict=True)]
