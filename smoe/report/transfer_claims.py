"""What the paper says of transfer, as checks on fine-tuned runs. To add one: a function, and its line in ``CLAIMS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from smoe.methods import METHODS
from smoe.paper import paper_results
from smoe.report.checks import BELOW, Check, Finding, Status, compare, status_of, status_words, weakest
from smoe.report.transfer import DISTILLATION, QUESTIONS, ROWS, Column, Kind, Tuned, difference, paired_scores

OURS, HALF, DENSE = ROWS[4], ROWS[3], ROWS[0]
FIGURE4 = (1, 2, 4, 8, 12, 16)  # the kept experts that script/figure4 runs


def beats_dense(columns: Sequence[Column]) -> list[Check]:
    """Table 2's columns, at k = N."""
    return _in_table2(columns, OURS, [DENSE])


def beats_learned(columns: Sequence[Column]) -> list[Check]:
    """THOR and learnable SMoE, both at k = N."""
    return _in_table2(columns, OURS, ROWS[1:3])


def all_beat_half(columns: Sequence[Column]) -> list[Check]:
    return _in_table2(columns, OURS, [HALF])


def improves_with_kept(columns: Sequence[Column]) -> list[Check]:
    """Each number of kept experts of Figure 4 against the next smaller one, where any were dropped."""
    checks = []
    for column in _table2(columns):
        kept = kept_of(column, "smoe_dropout")
        if len(kept) > 1:
            ks = [k for k in FIGURE4 if k <= max(kept)]
            steps = zip(ks[:-1], ks[1:], strict=True)
            checks += [_check(column, f"{b} kept", kept.get(b), f"{a} kept", kept.get(a)) for a, b in steps]
    return checks


def surpasses_from_half(columns: Sequence[Column]) -> list[Check]:
    """THOR and SMoE with as many kept experts, from half of them on, where any of theirs or ours were dropped."""
    checks = []
    for column in _table2(columns):
        kept = {method: kept_of(column, method) for method in ("smoe_dropout", "smoe", "thor")}
        if all(len(of_method) < 2 for of_method in kept.values()):
            continue  # Table 2's rows, of which another finding speaks
        most = max(k for of_method in kept.values() for k in of_method)
        for method in ("smoe", "thor"):
            for k in (k for k in FIGURE4 if most <= 2 * k <= 2 * most):
                names = [f"{METHODS[name].title}, {k} kept" for name in ("smoe_dropout", method)]
                checks.append(_check(column, names[0], kept["smoe_dropout"].get(k), names[1], kept[method].get(k)))
    return checks


def best_teacher(columns: Sequence[Column]) -> list[Check]:
    checks = []
    for column in (column for column in columns if column.task == DISTILLATION):
        students = column.students()
        for method in ("dense_dropout", "thor", "smoe"):
            names = [f"student of {METHODS[name].title}" for name in ("smoe_dropout", method)]
            checks.append(_check(column, names[0], students.get("smoe_dropout"), names[1], students.get(method)))
    return checks


def stable_on_sst2(columns: Sequence[Column]) -> list[Check]:
    """Half and all experts against every other row, over the seeds alone; only where one has several."""
    checks = []
    for column in (column for column in _table2(columns) if column.dataset == "sst2"):
        if all(len(tuned.runs) < 2 for tuned in column.tuned.values()):
            continue
        for ours in (OURS, HALF):
            for row in ROWS[:3]:
                sides = [column.of(name) for name in (ours, row)]
                names = [
                    column.label(tuned.kind) if tuned else row_label(r)
                    for tuned, r in zip(sides, (ours, row), strict=True)
                ]
                checks.append(compare(names[0], by_seed(sides[0]), names[1], by_seed(sides[1]), column.metric))
    return checks


def growing_helps_learned(columns: Sequence[Column]) -> list[Check]:
    return [
        _check(column, "SMoE, growing k, k = N", growing, "SMoE, k = N", column.of("smoe_k_N"))
        for column in _table2(columns)
        if (growing := next((t for t in kept_of(column, "smoe", growing=True).values() if _whole(t.kind)), None))
    ]


def random_beats_learned_growing(columns: Sequence[Column]) -> list[Check]:
    """At every number of kept experts of the one with growing k."""
    checks = []
    for column in _table2(columns):
        ours = kept_of(column, "smoe_dropout")
        for k, theirs in kept_of(column, "smoe", growing=True).items():
            checks.append(_check(column, f"SMoE-Dropout, k = {k}", ours.get(k), f"SMoE, growing k, k = {k}", theirs))
    return checks


def answers_best(columns: Sequence[Column]) -> list[Check]:
    return [_rows(c, OURS, row) for c in columns if c.task == QUESTIONS for row in (DENSE, "smoe_k_N")]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, where it makes it, and its checks on the columns of one scale and setting."""

    statement: str
    where: str
    check: Callable[[Sequence[Column]], list[Check]]


CLAIMS: dict[str, Claim] = {
    "transfer_dense": Claim("Fine-tuned, SMoE-Dropout at k = N is better than dense training", "Table 2", beats_dense),
    "transfer_learned": Claim(
        "Fine-tuned, SMoE-Dropout at k = N is better than THOR and learnable SMoE", "Table 2", beats_learned
    ),
    "transfer_half": Claim(
        "Fine-tuned SMoE-Dropout is better with all experts than with half", "Table 2", all_beat_half
    ),
    "transfer_kept": Claim("Fine-tuned SMoE-Dropout improves with every kept expert", "Figure 4", improves_with_kept),
    "transfer_budget": Claim(
        "With half of the experts or more, SMoE-Dropout is better than THOR and SMoE with as many",
        "Figure 4",
        surpasses_from_half,
    ),
    "teacher": Claim("A model trained with SMoE-Dropout is the best teacher", "Table 3", best_teacher),
    "seeds": Claim("On SST-2 the lead of SMoE-Dropout holds over seeds", "Table A4", stable_on_sst2),
    "growing_learned": Claim("Growing k helps the learned router", "Table A5", growing_helps_learned),
    "random_growing": Claim(
        "With growing k a fixed random router is better than a learned one", "Table A5", random_beats_learned_growing
    ),
    "questions": Claim("SMoE-Dropout answers multi-hop questions best", "Table A6", answers_best),
}


def transfer_findings(columns: Iterable[Column]) -> list[Finding]:
    """Every claim in every scale and setting that has runs for it; one without any is there once, as not run."""
    groups: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        groups.setdefault((column.scale, column.setting), []).append(column)
    findings = []
    for key, claim in CLAIMS.items():
        found = []
        for (scale, setting), group in groups.items():
            checks = claim.check(group)
            if any(check.status is not Status.NOT_RUN for check in checks):
                found.append(
                    Finding(key, claim.statement, claim.where, f"setting {setting}", f"scale {scale}", scale, checks)
                )
        findings += found or [Finding(key, claim.statement, claim.where, "", "", "")]
    return findings


def summary(findings: Sequence[Finding]) -> tuple[str, list[str]]:
    """How many claims hold, do not, drown in noise, were not run, in a sentence; and a line on each of them."""
    parts: dict[str, list[str]] = {}
    for finding in findings:
        run = [check for check in finding.checks if check.status is not Status.NOT_RUN]
        where = f" ({finding.where}, {finding.subject}, {finding.context}" if run else f" ({finding.where}"
        counts = {status: sum(check.status is status for check in finding.checks) for status in reversed(Status)}
        told = ", ".join(f"{status_words(status)} in {count}" for status, count in counts.items() if count)
        told = told.replace("few seeds", "no interval") + (f" of {len(finding.checks)} comparisons" if run else "")
        if idle := sum(check.note == BELOW for check in run):
            told += f", {BELOW} in {idle}"
        status = weakest(run)
        if run and idle == len(run):
            verdict = _SAYS_NOTHING
        elif status is Status.HELD and len(run) < len(finding.checks):
            verdict = _AS_FAR_AS_RUN
        else:
            verdict = _VERDICTS[status]
        parts.setdefault(verdict, []).append(f"{finding.statement}{where}{': ' + told if run else ''})")
    held, *others, not_run = _VERDICTS.values()
    order = [held, _AS_FAR_AS_RUN, *others, _SAYS_NOTHING, not_run]
    said = {verdict: parts[verdict] for verdict in order if verdict in parts}
    counts = "; ".join(f"{verdict[0].lower()}{verdict[1:]}: {len(lines)}" for verdict, lines in said.items())
    lines = [f"{verdict}: {line}" for verdict, lines in said.items() for line in lines]
    return f"What the paper says of transfer, in each setting and scale that was run: {counts}.", lines


_VERDICTS = {
    Status.HELD: "Held",
    Status.NOT_HELD: "Not held, in some comparison at least",
    Status.WITHIN_NOISE: "Within noise, in some comparison at least",
    Status.NO_DIFFERENCE: "No difference, in some comparison at least",
    Status.FEW_SEEDS: "Without an interval, as predictions or seeds are missing",
    Status.NOT_RUN: "Not run",
}
_AS_FAR_AS_RUN = "Held, as far as it was run"
_SAYS_NOTHING = "Nothing can be said yet, as all runs are at or below their floor"


def kept_of(column: Column, method: str, *, growing: bool = False) -> dict[int, Tuned]:
    """A method's runs by kept experts, ascending, in its first variant; ``growing``: pretrained with k that grows."""
    found: dict[tuple, dict[int, Tuned]] = {}
    for kind, tuned in column.tuned.items():
        if kind.method == method and kind.kept and bool(kind.pretrained_k) == growing and column.is_standard(kind):
            if not growing or kind.pretrained_k.endswith("linear"):
                found.setdefault((kind.options, kind.pretrained_k), {})[kind.kept] = tuned
    most = max(found.values(), key=len, default={})
    return dict(sorted(most.items()))


def row_label(row: str) -> str:
    """``SMoE-Dropout (k = N/2)`` for ``smoe_dropout_k_half``."""
    method, _, budget = row.partition("_k_")
    return METHODS[method].title + {"": "", "N": " (k = N)", "half": " (k = N/2)"}[budget]


def by_seed(tuned: Tuned | None) -> dict:
    return {} if tuned is None else {seed: tuned.score(seed).share for seed in tuned.seeds}


def _table2(columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if column.task not in (DISTILLATION, QUESTIONS)]


def _in_table2(columns: Sequence[Column], better: str, worse: Sequence[str]) -> list[Check]:
    """Rows of Table 2 against each other: in every column that there is, and, as not run, in the paper's others."""
    there = {(column.model, column.dataset): column for column in _table2(columns)}
    paper = [(model, task) for model, tasks in paper_results()["table2"].items() for task in tasks]
    checks = []
    for place in dict.fromkeys([*(paper if there and columns[0].setting in ("paper", "all") else []), *there]):
        names = f"{', '.join(place)}: {row_label(better)}"
        for row in worse:
            column = there.get(place)
            checks.append(_rows(column, better, row) if column else Check(names, row_label(row), Status.NOT_RUN))
    return checks


def _whole(kind: Kind) -> bool:
    return kind.kept == kind.of


def _rows(column: Column, better: str, worse: str) -> Check:
    return _check(column, row_label(better), column.of(better), row_label(worse), column.of(worse))


def _check(column: Column, better: str, a: Tuned | None, worse: str, b: Tuned | None) -> Check:
    """By examples and seeds, as :func:`smoe.report.transfer.difference` has it."""
    names = f"{column.name}: {better}", worse
    found = None if a is None or b is None else difference(a, b, column.margin)
    if found is None or a is None or b is None:
        return Check(*names, Status.NOT_RUN)
    ours, theirs = zip(*paired_scores(a, b), strict=True)  # on the folds that both have, as the difference is
    means = tuple(fmean(score.share for score in side) for side in (ours, theirs))
    idle = all(score.floors and score.share <= max(score.floors.values()) for score in (*ours, *theirs))
    return Check(*names, status_of(found), (means[0], means[1]), found, BELOW if idle else "")
