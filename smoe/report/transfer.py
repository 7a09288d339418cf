"""Fine-tuned runs in the terms of Tables 2, 3, A4 to A6 and Figure 4: which run is which cell, what two differ by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from smoe.methods import METHODS
from smoe.paper import SIZES, paper_results
from smoe.report.checks import DEFAULT_MARGIN, MARGINS
from smoe.report.groups import AS_RELEASED, plain, teacher_of
from smoe.report.predictions import compare_right
from smoe.report.records import dataset_name, examples_of, split_of, value_at, values_of
from smoe.report.runs import Run
from smoe.report.statistics import Difference, mean_interval, paired_bootstrap, wilson_interval

DISTILLATION, QUESTIONS = "distillation", "question_answering"
TASKS = ("classification", "multiple_choice", "math_word_problems", QUESTIONS, DISTILLATION)
FOLDS = 5  # of a set of word problems
# The rows of Table 2 as the paper's numbers are named.
ROWS = ("dense_dropout", "thor_k_N", "smoe_k_N", "smoe_dropout_k_half", "smoe_dropout_k_N")
SETTINGS = {
    "paper": "setting `paper`: 3 epochs of batches of 64, of word problems one fold",
    "all": "setting `all`: until validation stops rising or all steps are done, of word problems every fold",
    "challenge": "SVAMP as a challenge: all 1000 problems after training on MAWPS and ASDiv-A",
    "own": "as the scale trains by itself, which is neither setting of Table 2",
}


@dataclass(frozen=True)
class Kind:
    """What was fine-tuned: a method, ``kept`` of the ``of`` experts of its pretraining (None: it has none).

    pretrained_k: how k moved in pretraining, where not as the method has it. teacher: of a distilled model, with its
    variant. size: layers, and the width of an MLP before experts were dropped.
    """

    method: str
    kept: int | None = None
    of: int | None = None
    options: tuple[tuple[str, str], ...] = ()
    pretrained_k: str = ""
    teacher: str = ""
    size: tuple[int, int] = (0, 0)

    @property
    def row(self) -> str | None:
        """The name of its row in Table 2; None if it has none. A variant of a method is in its method's row."""
        budget = "" if self.kept is None else {1.0: "_k_N", 0.5: "_k_half"}.get(self.kept / (self.of or self.kept), "?")
        row = self.method + budget
        return row if row in ROWS and not self.pretrained_k and not self.teacher else None

    @property
    def as_released(self) -> bool:
        """Whether its layers weigh and scale experts as the release does, and so as the paper's numbers."""
        return all(option in _UNSAID for option in self.options if option[0] in AS_RELEASED)


_ALWAYS_SAID = (*AS_RELEASED, "vote_score", "vote_batches")
_UNSAID = set(AS_RELEASED.items())
_USUAL_VOTE = {("vote_score", "count"), ("vote_batches", "64")}  # what null stands for


@dataclass
class Score:
    """``right`` of ``n`` examples, over the folds; ``by_example``: whether each is right, None without predictions."""

    right: int
    n: int
    by_example: Mapping[Any, bool] | None
    floors: Mapping[str, float]

    @property
    def share(self) -> float:
        return self.right / self.n

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The Wilson interval of the share."""
        return wilson_interval(self.right, self.n)


@dataclass
class Tuned:
    """The runs of one kind in one column, by seed and fold (None where the task has no folds)."""

    kind: Kind
    runs: dict[Any, dict[Any, Run]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[Any]:
        return sorted(self.runs, key=str)

    def folds(self, seed: Any) -> list[Any]:
        return sorted(self.runs[seed], key=str)

    def score(self, seed: Any, folds: Sequence[Any] | None = None, k: str | None = None) -> Score:
        """Of one seed, over these folds (all that there are), each example counting as much.

        With ``k`` it is that of the same checkpoints with so many activated experts, without the examples.
        """
        chosen = [(fold, self.runs[seed][fold]) for fold in (self.folds(seed) if folds is None else folds)]
        counts = [examples_of(run.record) for _, run in chosen]
        values = [value_at(run.record, run.full) if k is None else values_of(run.record)[k] for _, run in chosen]
        rights = [round(n * value) for value, n in zip(values, counts, strict=True)]
        by_example = None
        if k is None and all(run.right is not None for _, run in chosen):
            by_example = {(fold, name): right for fold, run in chosen for name, right in run.right.items()}
        return Score(sum(rights), sum(counts), by_example, _floors([run for _, run in chosen], counts))

    def values(self, k: str | None = None) -> list[float]:
        """The share by seed, of seeds that have as many folds as any; ``k`` as in :meth:`score`."""
        most = max(map(len, self.runs.values()))
        return [self.score(seed, k=k).share for seed in self.seeds if len(self.runs[seed]) == most]

    def all_runs(self) -> list[Run]:
        """Of every seed and fold."""
        return [self.runs[seed][fold] for seed in self.seeds for fold in self.folds(seed)]

    def other(self, key: str) -> float | None:
        """Another metric of the first seed's run, None if its record has none."""
        (run, *_) = self.runs[self.seeds[0]].values()
        split = run.record["metrics"].get(key, {}).get(split_of(run.record))
        value = split.get(run.full) if isinstance(split, Mapping) else None
        return value if isinstance(value, (int, float)) else None


@dataclass
class Column:
    """One model on one data set, fine-tuned under one setting.

    encoder: the name of the encoder that it was before, which somebody else has pretrained; empty if there is none.
    """

    model: str
    dataset: str
    task: str
    scale: str
    setting: str
    metric: Mapping[str, Any]
    encoder: str = ""
    tuned: dict[Kind, Tuned] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.encoder or self.model}, {self.dataset}"

    def label(self, kind: Kind) -> str:
        """E.g. ``SMoE-Dropout (k = 8 of 16), output_scale k``: options that not all have, or not the release."""
        budget = "" if kind.kept is None else f" (k = {kind.kept} of {kind.of})"
        routed = [other.options for other in self.tuned if other.kept is not None]
        said = [
            f"{name} {value}"
            for name, value in kind.options
            if (name, value) not in _UNSAID
            and (name in _ALWAYS_SAID or any((name, value) not in options for options in routed))
        ]
        return plain(", ".join([f"{METHODS[kind.method].title}{budget}", *said]))

    @cached_property
    def standard(self) -> tuple[tuple[int, int], int | None]:
        """The size, and the experts before any were dropped, of most kinds: only these are in the paper's tables."""
        sizes = Counter(kind.size for kind in self.tuned)
        size = max(sizes, key=lambda size: (sizes[size], size))
        experts = Counter(kind.of for kind in self.tuned if kind.size == size and kind.of is not None)
        return size, max(experts, key=lambda n: (experts[n], n), default=None)

    def is_standard(self, kind: Kind) -> bool:
        """Whether the kind is of the standard size."""
        size, experts = self.standard
        return kind.size == size and kind.of in (None, experts)

    def of_row(self, row: str) -> list[Tuned]:
        """The kinds of a row of Table 2, the method as released first."""
        found = [tuned for kind, tuned in self.tuned.items() if kind.row == row and self.is_standard(kind)]
        return sorted(
            found, key=lambda tuned: (not tuned.kind.as_released, len(tuned.kind.options), tuned.kind.options)
        )

    def students(self) -> dict[str, Tuned]:
        """The distilled models of the standard size, by their teacher."""
        return {kind.teacher: tuned for kind, tuned in self.tuned.items() if self.is_standard(kind)}

    def of(self, row: str) -> Tuned | None:
        """The method of a row as released, else in its first variant; None if there is none."""
        return next(iter(self.of_row(row)), None)

    @property
    def margin(self) -> float:
        return MARGINS.get(self.metric["key"], DEFAULT_MARGIN)


def columns_of(runs: Iterable[Run], *, encoders: bool = False) -> list[Column]:
    """The fine-tuned runs by scale, setting, model and data, in the paper's order.

    Those of encoders that somebody else has pretrained, of which the paper has none, are left out; with ``encoders``
    they are what is returned.

    Where a column has runs under several other conditions (steps, learning rate), those of most kinds are taken.
    """
    found: dict[tuple, dict[tuple, list[tuple[Kind, Run]]]] = {}
    for run in runs:
        kind, encoder = kind_of(run), (run.record.get("pretrained") or {}).get("start_from") or ""
        if kind is None or bool(encoder) != encoders:
            continue
        where = (
            run.record["scale"],
            setting_of(run),
            run.record["model"],
            dataset_name(run.record),
            run.record["task"],
            encoder,
        )
        conditions = tuple((name, value) for name, value in run.conditions if name not in ("fold", "n", "teacher"))
        found.setdefault(where, {}).setdefault(conditions, []).append((kind, run))
    columns = []
    for (scale, setting, model, dataset, task, encoder), groups in found.items():
        most = max(groups.values(), key=lambda group: (len({kind for kind, _ in group}), len(group)))
        record = most[0][1].record
        metric = {"key": record["metric"], **record["metrics"][record["metric"]]}
        column = Column(*map(plain, (model, dataset, task, scale)), setting, metric, plain(encoder))
        for kind, run in most:
            of_seed = column.tuned.setdefault(kind, Tuned(kind)).runs.setdefault(run.seed, {})
            of_seed[run.record.get("fold")] = run
        columns.append(column)
    models, sets, settings = list(SIZES), _datasets(), list(SETTINGS)
    place = lambda value, known: (known.index(value) if value in known else len(known), value)  # noqa: E731
    where = lambda c: (place(c.model, models), place(c.dataset, sets), c.task, c.encoder)  # noqa: E731
    return sorted(columns, key=lambda c: (c.scale, settings.index(c.setting), where(c)))


def kind_of(run: Run) -> Kind | None:
    """None for a run that is no fine-tuning measured in shares, or one with fewer active experts than it has."""
    record = run.record
    metric = record["metrics"][record["metric"]]
    value, n = value_at(record, run.full), examples_of(record)
    if record.get("task") not in TASKS or metric["direction"] != "higher" or n is None:
        return None
    if value is None or not all(0 <= share <= 1 for share in (value, *values_of(record).values())):
        return None
    if run.num_experts is None:
        return Kind(run.method, teacher=teacher_of(record), size=(run.num_layers, run.d_hidden))
    config = record.get("config") or {}
    if not (run.own_router and run.all_layers and run.all_active and config.get("schedule") in (None, "constant")):
        return None
    votes = [(name, value) for name, value in run.options if name in ("vote_score", "vote_batches")]
    options = [option for option in run.options_of_all.items() if option[0] != "pretrained_k"]
    options += [option for option in votes if option not in _USUAL_VOTE]
    of = (record.get("pretrained") or {}).get("num_experts") or run.num_experts
    size = (run.num_layers, run.d_hidden // run.num_experts * of)
    return Kind(run.method, run.num_experts, of, tuple(options), dict(run.options).get("pretrained_k", ""), size=size)


def setting_of(run: Run) -> str:
    """Which setting of Table 2's scripts a record's configuration is."""
    config = run.record.get("config") or {}
    if config.get("fold") == "challenge":
        return "challenge"
    if config.get("patience") is not None:
        return "all"
    return "paper" if (config.get("epochs"), config.get("batch_size")) == (3, 64) else "own"


def shared(a: Tuned, b: Tuned) -> list[tuple[Any, list[Any]]]:
    """The seeds that both have, each with the folds that both have."""
    both = [(seed, [fold for fold in a.folds(seed) if fold in b.runs[seed]]) for seed in a.seeds if seed in b.runs]
    return [(seed, folds) for seed, folds in both if folds]


def paired_scores(a: Tuned, b: Tuned) -> list[tuple[Score, Score]]:
    """What the two reach, per seed that both have, on the folds that both have."""
    return [(a.score(seed, folds), b.score(seed, folds)) for seed, folds in shared(a, b)]


def mcnemar_p(a: Tuned, b: Tuned) -> float | None:
    """p of McNemar's exact test at the first shared seed; None without predictions of the same examples."""
    for one, other in ((mine.by_example, theirs.by_example) for mine, theirs in paired_scores(a, b)):
        if one and other and one.keys() == other.keys() and len(one) > 1:
            return compare_right(one, other).p
    return None


def difference(a: Tuned, b: Tuned, margin: float) -> Difference | None:
    """``a`` minus ``b``, the mean over the seeds that both have, on the same folds; None if there is none.

    Its interval covers what is known of: the paired bootstrap over the examples, each averaged over the seeds, where
    there are predictions; and the t interval over the seeds, where there are three.
    """
    scores = paired_scores(a, b)
    if not scores:
        return None
    differences = [one.share - other.share for one, other in scores]
    intervals = [mean_interval(differences)]
    names = scores[0][0].by_example
    if (
        names
        and len(names) > 1
        and all(s.by_example and s.by_example.keys() == names.keys() for p in scores for s in p)
    ):
        means = [[sum(s[i].by_example[name] for s in scores) / len(scores) for name in names] for i in (0, 1)]
        intervals.append(paired_bootstrap(*means))
    known = [interval for interval in intervals if interval is not None]
    seeds, mean = tuple(seed for seed, _ in shared(a, b)), sum(differences) / len(differences)
    if not known:
        return Difference(seeds, mean, margin)
    low, high = min(low for low, _ in known), max(high for _, high in known)
    return Difference(seeds, mean, margin, low, high, 0.0 if -margin < low and high < margin else 1.0)


def complete(tuned: Tuned, seed: Any) -> str:
    """``3 of 5 folds`` where some are missing."""
    folds = tuned.folds(seed)
    run = tuned.runs[seed][folds[0]]
    pooled = setting_of(run) == "all" and folds != [None]
    return f"{len(folds)} of {FOLDS} folds" if pooled and len(folds) < FOLDS else ""


def _datasets() -> list[str]:
    return list(dict.fromkeys(task for tasks in paper_results()["table2"].values() for task in tasks))


def _floors(runs: Sequence[Run], counts: Sequence[int]) -> dict[str, float]:
    """Each floor that all records have, over their examples."""
    sums: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for run, n in zip(runs, counts, strict=True):
        for name, shares in (run.record.get("floors") or {}).items():
            if split_of(run.record) in shares:
                sums[name] += n * shares[split_of(run.record)]
                times[name] += 1
    return {name: sums[name] / sum(counts) for name in sums if times[name] == len(runs)}
