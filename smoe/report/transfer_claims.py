"""What the paper says of transfer, as checks on fine-tuned runs. To add one: a function, and its line in ``CLAIMS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from smoe.methods import METHODS
from smoe.report.checks import Check, Finding, Status, compare, status_of, status_words
from smoe.report.transfer import DISTILLATION, QUESTIONS, ROWS, Column, Kind, Tuned, difference

OURS, HALF, DENSE = ROWS[4], ROWS[3], ROWS[0]


def beats_dense(columns: Sequence[Column]) -> list[Check]:
    """Table 2's columns, at k = N."""
    return [_rows(column, OURS, DENSE) for column in _table2(columns)]


def beats_learned(columns: Sequence[Column]) -> list[Check]:
    """THOR and learnable SMoE, both at k = N."""
    return [_rows(column, OURS, row) for column in _table2(columns) for row in ROWS[1:3]]


def all_beat_half(columns: Sequence[Column]) -> list[Check]:
    return [_rows(column, OURS, HALF) for column in _table2(columns)]


def improves_with_kept(columns: Sequence[Column]) -> list[Check]:
    """Each number of kept experts against the next smaller one that was run."""
    checks = []
    for column in _table2(columns):
        by_kept = kept_of(column, "smoe_dropout")
        steps = zip(list(by_kept)[:-1], list(by_kept)[1:], strict=True)
        checks += [_check(column, f"k = {b}", by_kept[b], f"k = {a}", by_kept[a]) for a, b in steps]
    return checks


def surpasses_from_half(columns: Sequence[Column]) -> list[Check]:
    """Other methods with as many kept experts, from half of them on."""
    checks = []
    for column in _table2(columns):
        ours = kept_of(column, "smoe_dropout")
        for method in ("smoe", "thor"):
            for kept, theirs in kept_of(column, method).items():
                if 2 * kept >= (theirs.kind.of or 0) and kept in ours:
                    names = (f"{METHODS[name].title}, k = {kept}" for name in ("smoe_dropout", method))
                    checks.append(_check(column, next(names), ours[kept], next(names), theirs))
    return checks


def best_teacher(columns: Sequence[Column]) -> list[Check]:
    checks = []
    for column in (column for column in columns if column.task == DISTILLATION):
        students = {kind.teacher: tuned for kind, tuned in column.tuned.items()}
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
    """At every number of kept experts that both have."""
    checks = []
    for column in _table2(columns):
        ours, theirs = kept_of(column, "smoe_dropout"), kept_of(column, "smoe", growing=True)
        for k in (k for k in ours if k in theirs):
            checks.append(_check(column, f"SMoE-Dropout, k = {k}", ours[k], f"SMoE, growing k, k = {k}", theirs[k]))
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


def summary(findings: Sequence[Finding]) -> str:
    """One paragraph: which claims hold, which do not, which drown in noise, which were not run."""
    parts: dict[str, list[str]] = {}
    for finding in findings:
        run = [check for check in finding.checks if check.status is not Status.NOT_RUN]
        where = f" ({finding.where}; {finding.subject}, {finding.context}" if run else f" ({finding.where}"
        counts = {status: sum(check.status is status for check in run) for status in reversed(Status)}
        told = ", ".join(f"{status_words(status)} in {count}" for status, count in counts.items() if count)
        told = told.replace("few seeds", "no interval") + (f" of {len(run)} comparisons" if run else "")
        status = min((check.status for check in run), default=Status.NOT_RUN)
        parts.setdefault(_VERDICTS[status], []).append(f"{finding.statement}{where}{': ' + told if run else ''})")
    found = [
        f"{verdict}: {'; '.join(parts[verdict])}." for verdict in dict.fromkeys(_VERDICTS.values()) if verdict in parts
    ]
    return "Of what the paper says of transfer: " + " ".join(found)


_VERDICTS = {
    Status.HELD: "Held",
    Status.NOT_HELD: "Not held, in some comparison at least",
    Status.WITHIN_NOISE: "Drowned in noise, in some comparison at least",
    Status.NO_DIFFERENCE: "No difference, in some comparison at least",
    Status.FEW_SEEDS: "Without an interval, for want of predictions and seeds",
    Status.NOT_RUN: "Not run",
}


def kept_of(column: Column, method: str, *, growing: bool = False) -> dict[int, Tuned]:
    """A method's runs by kept experts, ascending, in its first variant; ``growing``: pretrained with k that grows."""
    found: dict[tuple, dict[int, Tuned]] = {}
    for kind, tuned in column.tuned.items():
        if kind.method == method and kind.kept and bool(kind.pretrained_k) == growing:
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
    means = tuple(sum(by_seed(side)[seed] for seed in found.seeds) / len(found.seeds) for side in (a, b))
    return Check(*names, status_of(found), (means[0], means[1]), found)
