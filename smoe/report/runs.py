"""A record in the terms that the paper's panels vary: depth, experts, router, k schedule; and what it compares with."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from sys import float_info
from typing import Any

from smoe.methods import METHODS
from smoe.modulize.layers import chosen_layers
from smoe.paper import SIZES
from smoe.report.groups import AS_RELEASED, departures, plain, settings_of, variant_of, within_a_sentence
from smoe.report.records import Record, dataset_name, split_of, value_at, values_of

_SIZES = {"num_layers", "num_experts", "d_hidden", "d_hidden_bert", "d_hidden_roberta"}
_ROUTING = {"layers", "router", "schedule", "k_min", "k_max"}
# What else only experts have: variants of a method, each compared on its own.
_VOTES = ("keep", "vote_score", "vote_batches")
_OPTIONS = ("score", "output_scale", "expert_dropout", "balance_weight", "consistency_weight", "pretrained_k", *_VOTES)
# Said first where two conditions must be told apart.
_TELLING = ("steps", "batch_size", "learning_rate")


@dataclass(frozen=True)
class Run:
    """A record, and what its configuration says of the model and of its training.

    num_experts, router, schedule: None for a dense method. layers: the indices of those with experts.
    schedule: (k_min, k_max, mode), the method's own where the configuration says nothing else.
    options: what else only experts have, by name, as text. conditions: everything else but the seed, likewise; runs
    are compared only where these agree.
    right: whether it is right with all of its experts, by example; None without predictions beside the record.
    """

    record: Record
    method: str
    seed: int | None
    num_layers: int
    d_hidden: int
    num_experts: int | None
    layers: tuple[int, ...]
    router: str | None
    schedule: tuple[int, int, str] | None
    options: tuple[tuple[str, str], ...]
    conditions: tuple[tuple[str, str], ...]
    right: Mapping[str, bool] | None = None

    @property
    def identity(self) -> tuple:
        """Equal for runs that are the same but for the seed."""
        return (self.method, self.num_layers, self.d_hidden, self.num_experts, self.layers, self.router, self.schedule,
                self.options, self.conditions)  # fmt: skip

    @property
    def own_router(self) -> bool:
        """Whether tokens are routed as its method does."""
        return self.router == METHODS[self.method].router

    @property
    def own_schedule(self) -> bool:
        """Whether k moves as its method has it."""
        method = METHODS[self.method]
        if self.num_experts is None:
            return True
        return self.schedule == (method.k_min(self.num_experts), method.k_max(self.num_experts), method.schedule)

    @property
    def all_layers(self) -> bool:
        """Whether every layer has experts, or none."""
        return self.num_experts is None or len(self.layers) == self.num_layers

    @property
    def all_active(self) -> bool:
        """Whether it, a fine-tuning, activated all of its experts throughout, as they do unless told otherwise."""
        k_max = (self.record.get("config") or {}).get("k_max")
        return self.num_experts is None or k_max in (None, self.num_experts)

    @property
    def options_of_all(self) -> dict[str, str]:
        """``options`` but for those of the experts that it has kept, and as they are when it has kept all."""
        options = {name: value for name, value in self.options if name not in _VOTES}
        experts = (self.record.get("pretrained") or {}).get("num_experts")
        if options.get("output_scale") == str(experts):  # of training, where it was said as num_experts
            options["output_scale"] = "num_experts"
        return options

    @property
    def variant(self) -> str:
        """In which options it departs from its method as released, but for router, layers and schedule; mostly none."""
        return variant_of(self.method, self.options_of_all)

    @property
    def full(self) -> str:
        """The key of all its experts: ``dense``, or N as text."""
        return "dense" if self.num_experts is None else str(self.num_experts)


@dataclass
class Cell:
    """Runs that are the same but for the seed."""

    runs: list[Run] = field(default_factory=list)

    @property
    def first(self) -> Run:
        """Any of them, for what they share."""
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        """Their seeds, ascending, each once; runs that do not say theirs are left out."""
        return sorted({run.seed for run in self.runs if run.seed is not None})

    def at(self, key: str) -> dict[int | None, float]:
        """The deciding metric at this k by seed, of the checkpoint chosen at it if there is one (``value_at``)."""
        values = {run.seed: value_at(run.record, key) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None}

    def swept(self, key: str) -> dict[int | None, float]:
        """The same of the one checkpoint that was measured at every k."""
        return {run.seed: values_of(run.record)[key] for run in self.runs if key in values_of(run.record)}


@dataclass
class Context:
    """Runs that can be compared: one model, task, data set, scale and metric, trained under the same conditions."""

    model: str
    task: str
    dataset: str
    scale: str
    metric: Mapping[str, Any]  # key, title, unit, direction, split
    runs: list[Run] = field(default_factory=list)
    label: str = ""

    @property
    def measure(self) -> str:
        """E.g. ``test BPC (lower is better)``."""
        title = within_a_sentence(self.metric["title"])
        return f"{self.metric['split']} {title} ({self.metric['direction']} is better)"

    @property
    def place(self) -> str:
        """What its label begins with, e.g. ``bert on csqa, scale cpu``."""
        return f"{self.model} on {self.dataset}, scale {self.scale}"

    @cached_property
    def standard(self) -> tuple[int, int, int | None]:
        """(layers, MLP width, experts) of most kinds of runs: Table 1's, from which panels depart in one respect."""
        kinds = {run.identity: run for run in self.runs}.values()
        sizes = Counter((run.num_layers, run.d_hidden) for run in kinds)
        size = max(sizes, key=lambda size: (sizes[size], size))
        experts = Counter(run.num_experts for run in kinds if (run.num_layers, run.d_hidden) == size)
        del experts[None]
        return *size, max(experts, key=lambda n: (experts[n], n), default=None)

    def is_standard(self, run: Run) -> bool:
        """Whether the run is of the standard size."""
        num_layers, d_hidden, num_experts = self.standard
        same = (run.num_layers, run.d_hidden) == (num_layers, d_hidden)
        return same and run.num_experts in (None, num_experts)


def read_run(record: Record, name: str) -> Run:
    """The record as a run; ValueError naming ``name`` and the field where its configuration doesn't say what it needs.

    The record must have passed ``check_result``.
    """
    config, method = record.get("config") or {}, record["method"]
    if method not in METHODS:
        raise ValueError(f"{name}: method is {reprlib.repr(method)}; it must be one of {', '.join(METHODS)}")
    num_layers, d_hidden = (_whole(config, field, name) for field in ("num_layers", "d_hidden"))
    task, keys = record.get("task"), values_of(record).keys()
    if task is not None and not isinstance(task, str):
        raise ValueError(f"{name}: task is {reprlib.repr(task)}; it must be text")
    if METHODS[method].routed == ("dense" in keys) or not METHODS[method].routed and len(keys) > 1:
        allowed = "a number for each k" if METHODS[method].routed else "one number, for 'dense'"
        raise ValueError(f"{name}: {method} was measured at {', '.join(keys)}; it must have {allowed}")
    num_experts, layers, router, schedule = None, (), None, None
    settings = settings_of(record)
    if METHODS[method].routed:
        num_experts = _whole(config, "num_experts", name)
        if d_hidden % num_experts:
            raise ValueError(
                f"{name}: config.d_hidden is {d_hidden}; it must be a multiple of num_experts = {num_experts}"
            )
        layers = _layers(config, num_layers, name)
        router = _own_or(config, "router", METHODS[method].router, str, name)
        k_max = _own_or(config, "k_max", METHODS[method].k_max(num_experts), int, name)
        k_min = _own_or(config, "k_min", min(METHODS[method].k_min(num_experts), k_max), int, name)
        schedule = (k_min, k_max, _own_or(config, "schedule", METHODS[method].schedule, str, name))
    known = AS_RELEASED | settings
    options = tuple((name, known[name]) for name in _OPTIONS if name in known) if num_experts else ()
    _check_parts(record, name)
    conditions = {name: value for name, value in settings.items() if name not in {*_SIZES, *_ROUTING, *_OPTIONS}}
    return Run(record, method, record.get("seed"), num_layers, d_hidden, num_experts, layers, router, schedule, options,
               tuple(sorted(conditions.items())))  # fmt: skip


def contexts_of(runs: Iterable[Run]) -> list[Context]:
    """The runs, by what can be compared: the paper's models in its order, then by scale and label."""
    contexts: dict[tuple, Context] = {}
    for run in runs:
        record = run.record
        metric, task = record["metrics"][record["metric"]], record.get("task") or ""
        shown = {name: plain(metric[name]) for name in ("title", "unit", "direction")}
        shown |= {"key": record["metric"], "split": split_of(record)}
        where = (record["model"], task, dataset_name(record), record["scale"])
        key = (*where, *shown.items(), run.conditions)
        contexts.setdefault(key, Context(*map(plain, where), shown)).runs.append(run)
    _name_contexts(list(contexts.values()))
    place = {model: number for number, model in enumerate(SIZES)}
    return sorted(contexts.values(), key=lambda c: (place.get(c.model, len(place)), c.scale, c.label))


def cells_of(runs: Iterable[Run]) -> list[Cell]:
    """The runs, those that are the same but for the seed together, in the order given."""
    cells: dict[tuple, Cell] = {}
    for run in runs:
        cells.setdefault(run.identity, Cell()).runs.append(run)
    return list(cells.values())


def variant_names(cells: Sequence[Cell]) -> list[str]:
    """For each cell, the options that are not the release's, and others in which it departs from most; mostly none."""
    routed = [dict(cell.first.options) for cell in cells if cell.first.num_experts is not None]
    others = departures([{name: options[name] for name in options.keys() - AS_RELEASED.keys()} for options in routed])
    names = []
    for options, said in zip(routed, others, strict=True):
        own = [f"{name} {options[name]}" for name, usual in AS_RELEASED.items() if options[name] != usual]
        names.append(plain(", ".join(own + said)))
    return ["" if cell.first.num_experts is None else names.pop(0) for cell in cells]


def _name_contexts(contexts: Sequence[Context]) -> None:
    """Labels each with model, data and scale, and, where others share these, with the conditions that differ."""
    for context in contexts:
        same = [other for other in contexts if _place(other) == _place(context)]
        mine, said = dict(context.runs[0].conditions), []
        others = [dict(other.runs[0].conditions) for other in same if other is not context]
        for name in [*_TELLING, *sorted(mine.keys() | {name for other in others for name in other})]:
            if not others:
                break
            if any(other.get(name) != mine.get(name) for other in others):
                said.append(f"{name} {mine[name]}" if name in mine else f"{name} not set")
                others = [other for other in others if other.get(name) == mine.get(name)]
        context.label = plain(", ".join([context.place, *said]), 200)


def _place(context: Context) -> tuple:
    return context.model, context.dataset, context.scale


def _check_parts(record: Record, name: str) -> None:
    """ValueError where what a record says of its pretraining, its teacher or its floors is not what it must be."""
    for part in ("pretrained", "teacher", "floors"):
        if not isinstance(record.get(part) or {}, Mapping):
            raise ValueError(f"{name}: {part} is {reprlib.repr(record[part])}; it must be fields by name")
    if (record.get("pretrained") or {}).get("num_experts") is not None:
        _whole(record["pretrained"], "num_experts", name)
    is_share = record["metrics"][record["metric"]]["direction"] == "higher"  # others are bits
    most, what = (1, "share") if is_share else (float_info.max, "number of at least 0")
    for floor, values in (record.get("floors") or {}).items():
        proper = isinstance(values, Mapping) and all(
            isinstance(value, (int, float)) and 0 <= value <= most for value in values.values()
        )
        if not proper:
            raise ValueError(f"{name}: floors.{floor} is {reprlib.repr(values)}; it must be a {what} for each split")


def _whole(config: Mapping[str, Any], field: str, name: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**6:
        raise ValueError(
            f"{name}: config.{field} is {reprlib.repr(value)}; it must be a whole number from 1 to 1000000"
        )
    return value


def _layers(config: Mapping[str, Any], num_layers: int, name: str) -> tuple[int, ...]:
    layers = config.get("layers") or "all"
    try:
        if not isinstance(layers, (str, list)):
            raise ValueError(f"layers is {reprlib.repr(layers)}; it must be a name or a list of indices")
        return tuple(chosen_layers(layers, num_layers))
    except ValueError as error:
        raise ValueError(f"{name}: config.{error}") from None


def _own_or(config: Mapping[str, Any], field: str, own: Any, kind: type, name: str) -> Any:
    value = config.get(field)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        words = "text" if kind is str else "a whole number"
        raise ValueError(f"{name}: config.{field} is {reprlib.repr(value)}; it must be {words}, or null")
    return own if value is None else value
