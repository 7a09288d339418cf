"""The paper's findings as checks on the records of runs. To add one: a function, and its line in ``CLAIMS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from smoe.methods import METHODS
from smoe.report.checks import Check, Finding, Status, check_all, compare, gaps
from smoe.report.panels import DENSE, OURS, PRETRAINING, Line, figure5a, figure5b, position_name, schedule_name
from smoe.report.records import values_of
from smoe.report.runs import Cell, Context, Run, cells_of, variant_names

DEPTHS, WIDTHS = (2, 4, 8, 12), (2, 4, 8, 16)  # layers and experts of Figure 5 (a) and (b)


@dataclass(frozen=True)
class Subject:
    """A method in one variant (its options, such as an output scale), among the runs that it compares with."""

    context: Context
    method: str
    options: tuple[tuple[str, str], ...]

    def cells(self, method: str, fits: Callable[[Run], bool]) -> list[Cell]:
        """Runs of a method at the standard size, in this variant if there are any, else in whichever there is."""
        runs = [r for r in self.context.runs if r.method == method and self.context.is_standard(r) and fits(r)]
        same = [run for run in runs if run.options == self.options]
        if same or method == self.method:
            return cells_of(same)
        return sorted(cells_of(runs), key=lambda cell: (len(cell.runs), cell.first.options), reverse=True)

    def own(self, method: str = OURS) -> Cell:
        """The method as it is: its own router and schedule, in every layer; an empty cell if it was not run."""
        cells = self.cells(method, lambda run: run.own_router and run.own_schedule and run.all_layers)
        return cells[0] if cells else Cell()

    def line(self, lines: Iterable[Line], method: str) -> dict[float, dict]:
        """The values by seed at each x of the method's line in this variant."""
        found = [line for line in lines if line.style == method]
        same = [line for line in found if line.points[0].cell.first.options == self.options]
        found = same if same or method == self.method else found
        return {point.x: point.cell.at(point.key) for point in found[0].points} if found else {}


def beats_baselines(s: Subject) -> list[Check]:
    """At k = N; SMoE and THOR by the checkpoint that was chosen at N."""
    ours = _full(s.own())
    return [_against(s, ours, method) for method in METHODS if method != OURS]


def improves_with_k(s: Subject) -> list[Check]:
    """Each k against the next smaller one that was measured, of one checkpoint."""
    cell = s.own()
    return check_all([(f"k = {key}", cell.swept(key)) for key in _keys(cell)], s.context.metric)


def learned_deteriorates(s: Subject) -> list[Check]:
    """Learnable SMoE at the k that it is trained with against k = N, of one checkpoint."""
    cell = s.own("smoe")
    if not cell.runs or cell.first.schedule is None:
        return [_not_run("SMoE at its training k", "SMoE at k = N")]
    trained, full = str(cell.first.schedule[1]), cell.first.full
    names = f"SMoE, k = {trained} (trained)", f"SMoE, k = {full}"
    return [compare(names[0], cell.swept(trained), names[1], cell.swept(full), s.context.metric)]


def growing_matters(s: Subject) -> list[Check]:
    """Growing k against a constant one at k = N; of the constant one, that more experts than in training are worse
    (trained with fewer than N), or that half of them are worse than with growing k (trained with N)."""
    growing, metric, checks = s.own(), s.context.metric, []
    for cell in s.cells(OURS, lambda run: run.own_router and run.all_layers and _constant(run)):
        assert cell.first.schedule is not None and cell.first.num_experts is not None
        trained, n, name = cell.first.schedule[1], cell.first.num_experts, schedule_name(cell.first)
        for k in (n,) if trained < n else (n, n // 2):
            ours, theirs = growing.at(str(k)), cell.at(str(k))
            checks.append(compare(f"growing, at k = {k}", ours, f"{name}, at k = {k}", theirs, metric))
        if trained < n:
            checks += check_all([(f"{name}, at k = {k}", cell.swept(str(k))) for k in (n, trained)], metric)
    return checks or [_not_run("growing k", "constant k")]


def later_layers_better(s: Subject) -> list[Check]:
    """Experts in the last half of the layers against the first half, at k = N."""
    cells = s.cells(OURS, lambda run: run.own_router and run.own_schedule)
    named = {position_name(cell.first): cell for cell in cells}
    later, early = (_full(named.get(name, Cell())) for name in ("later", "early"))
    return [compare("later layers", later, "early layers", early, s.context.metric)]


def random_beats_other_routing(s: Subject) -> list[Check]:
    """The fixed random router against each other assignment without learning, at every k."""
    cells = {c.first.router: c for c in s.cells(OURS, lambda run: run.own_schedule and run.all_layers)}
    ours = cells.get("random", Cell())
    checks = []
    for router in ("hash", "uniform"):
        other = cells.get(router, Cell())
        shared = [key for key in _keys(ours) if other.swept(key)]
        pairs = [(f", k = {key}", ours.swept(key), other.swept(key)) for key in shared] or [("", {}, {})]
        checks += [compare(f"random{k}", a, f"{router}{k}", b, s.context.metric) for k, a, b in pairs]
    return checks


def depth_widens_gap(s: Subject) -> list[Check]:
    """The lead over the learned router at each depth against the next smaller one."""
    return _gap_grows(s, figure5a(s.context).lines, "layers")


def width_widens_gap(s: Subject) -> list[Check]:
    """The lead over the learned router at each number of experts against the next smaller one."""
    return _gap_grows(s, figure5b(s.context).lines, "experts")


def no_overfitting(s: Subject) -> list[Check]:
    """Dense and SMoE-Dropout at each depth and width against the next smaller one."""
    checks = []
    for lines, unit in ((figure5a(s.context).lines, "layers"), (figure5b(s.context).lines, "experts")):
        for method in (DENSE, OURS):
            values, title = s.line(lines, method), METHODS[method].title
            if len(values) > 1:
                checks += _steps(values, unit, f"{title}, {{}} {unit}", s.context.metric)
            else:
                checks.append(_not_run(f"{title}, more {unit}", f"{title}, fewer {unit}"))
    return checks


def learned_overfits(s: Subject) -> list[Check]:
    """Learnable SMoE at the two largest depths of Figure 5."""
    values = s.line(figure5a(s.context).lines, "smoe")
    less, most = DEPTHS[-2:]
    names = f"SMoE, {less} layers", f"SMoE, {most} layers"
    return [compare(names[0], values.get(less, {}), names[1], values.get(most, {}), s.context.metric)]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, where it makes it, and its checks."""

    statement: str
    where: str
    check: Callable[[Subject], list[Check]]
    of: str = OURS  # the method that it is about


CLAIMS: dict[str, Claim] = {
    "beats_baselines": Claim("SMoE-Dropout is better than every baseline at k = N", "Table 1", beats_baselines),
    "improves_with_k": Claim("SMoE-Dropout improves with every k", "Figures 1 and 3", improves_with_k),
    "learned_deteriorates": Claim(
        "The learned router deteriorates past the k that it is trained with",
        "Figures 1 and 3",
        learned_deteriorates,
        "smoe",
    ),
    "growing_matters": Claim("Without growing k the slimming vanishes", "Figure 5 (d)", growing_matters),
    "later_layers": Claim("Experts in later layers are better than in early ones", "Figure 5 (e)", later_layers_better),
    "random_routing": Claim(
        "A fixed random router is better than hash and uniform routing", "Figure 5 (c)", random_beats_other_routing
    ),
    "depth": Claim("Depth widens the lead over the learned router", "Figure 5 (a)", depth_widens_gap),
    "width": Claim("Width widens the lead over the learned router", "Figure 5 (b)", width_widens_gap),
    "no_overfitting": Claim(
        "Dense training and SMoE-Dropout improve with depth and width", "Figure 5 (a), (b)", no_overfitting
    ),
    "learned_overfits": Claim(
        "The learned router overfits at the largest depth", "Figure 5 (a)", learned_overfits, "smoe"
    ),
}


def findings_of(contexts: Iterable[Context]) -> list[Finding]:
    """Every claim on every variant of its method, in every context of pretraining that has runs for it.

    A claim that no context has runs for is there once, as not run.
    """
    contexts = [context for context in contexts if context.task in PRETRAINING]
    findings = []
    for key, claim in CLAIMS.items():
        subjects = [subject for context in contexts for subject in _subjects(context, claim.of)]
        found = [finding for subject, name in subjects if (finding := _finding(key, claim, subject, name))]
        findings += found or [Finding(key, claim.statement, claim.where, "", "", "")]
    return findings


def _finding(key: str, claim: Claim, subject: Subject, name: str) -> Finding | None:
    checks = claim.check(subject)
    if all(check.status is Status.NOT_RUN for check in checks):
        return None
    context = subject.context
    return Finding(key, claim.statement, claim.where, name, context.label, context.scale, checks)


def _subjects(context: Context, method: str) -> list[tuple[Subject, str]]:
    first: dict[tuple, Cell] = {}
    for cell in cells_of(run for run in context.runs if run.method == method):
        first.setdefault(cell.first.options, cell)
    names, title = variant_names(list(first.values())), METHODS[method].title
    return [
        (Subject(context, method, options), f"{title}, {name}" if name else title)
        for options, name in zip(first, names, strict=True)
    ]


def _against(s: Subject, ours: dict, method: str) -> Check:
    return compare(METHODS[OURS].title, ours, METHODS[method].title, _full(s.own(method)), s.context.metric)


def _gap_grows(s: Subject, lines: list[Line], unit: str) -> list[Check]:
    ours, theirs = s.line(lines, OURS), s.line(lines, "smoe")
    sign = 1 if s.context.metric["direction"] == "lower" else -1
    lead = {x: {i: sign * gap for i, gap in gaps(theirs[x], ours[x]).items()} for x in sorted(ours.keys() & theirs)}
    lead = {x: by_seed for x, by_seed in lead.items() if by_seed}
    if len(lead) < 2:
        return [_not_run(f"lead with more {unit}", f"lead with fewer {unit}")]
    return _steps(lead, unit, f"lead with {{}} {unit}", {**s.context.metric, "direction": "higher"})


def _steps(values: Mapping[float, dict], unit: str, name: str, metric: Mapping[str, Any]) -> list[Check]:
    """Each size against the next smaller one of those that were run; the paper's others as not run."""
    checks = check_all([(name.format(f"{x:g}"), values[x]) for x in sorted(values)], metric)
    sizes = DEPTHS if unit == "layers" else WIDTHS
    return checks + [_not_run(name.format(x), name.format("fewer")) for x in sizes if x not in values]


def _constant(run: Run) -> bool:
    return run.schedule is not None and run.schedule[2] == "constant"


def _full(cell: Cell) -> dict:
    return cell.at(cell.first.full) if cell.runs else {}


def _keys(cell: Cell) -> list[str]:
    return sorted(values_of(cell.first.record), key=int) if cell.runs else []


def _not_run(better: str, worse: str) -> Check:
    return Check(better, worse, Status.NOT_RUN)
