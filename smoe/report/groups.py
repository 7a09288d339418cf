"""Which runs can be compared, which are the same but for the seed, and what each group of them is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smoe.earlier import EARLIER
from smoe.methods import METHODS
from smoe.report.records import Record, check_result, dataset_name, examples_of, parameters_at, split_of, values_of

# Fields of a configuration that change no result: where things are, how often they are said, and how they are computed.
_NO_RESULT = {"run_dir", "data", "resume", "progress", "process_timeout", "log_interval", "save_interval"}
_NO_RESULT |= {"scale_reason", "engine", "expert_parallel", "fsdp"}
# Told by other fields of the record: the seed tells the runs of a group apart, what `auto` came to stands outside.
_TOLD_ELSEWHERE = {"seed", "method", "scale", "model", "precision", "sweep"}
# Fields that take the method's own value when they are null.
_OWN = {"router", "schedule", "k_min", "k_max", "balance_weight", "consistency_weight"}
# How experts are weighed and scaled in the released code; it goes without saying.
AS_RELEASED = {"score": "softmax_after_topk", "output_scale": "1"}
# In what else a method may depart from itself.
_VARIED = ("balance_weight", "consistency_weight", "pretrained_k", "router", "layers", "schedule", "k_min", "k_max")
# Fields that a dense model has no use for.
_OF_EXPERTS = {"num_experts", "layers", "score", "output_scale", "expert_dropout"} | _OWN


@dataclass
class Group:
    """Runs that agree in everything but the seed.

    settings: what it was trained and measured with, by name, as text.
    sizes: what follows from them (parameters, the k that were measured), as far as the record tells.
    label: its name and what tells it from the other groups of its block, as one line of plain text.
    """

    method: str
    own_label: str | None
    settings: dict[str, str]
    sizes: dict[str, str]
    records: list[Record] = field(default_factory=list)
    label: str = ""

    @property
    def name(self) -> str:
        """The label that its runs gave themselves, else the title of their method."""
        return self.own_label or (METHODS[self.method].title if self.method in METHODS else self.method)

    @property
    def variant(self) -> str:
        """In which options it departs from its method as released, or that it has a label of its own; mostly none."""
        settings = self.settings
        if self.records[0].get("pretrained"):  # how k moves in a fine-tuning is no matter of the method
            settings = {name: value for name, value in settings.items() if name != "schedule"}
        return variant_of(self.method, settings) or self.own_label or ""

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs, as far as they say."""
        return [record["seed"] for record in self.records if record.get("seed") is not None]

    @property
    def keys(self) -> list[str]:
        """The k that every run was measured at, ascending, ``dense`` last."""
        return sorted(values_of(self.records[0]), key=lambda key: (key == "dense", int(key) if key != "dense" else 0))

    def values(self, key: str) -> list[float]:
        """The metric at this k, one value per run."""
        return [values_of(record)[key] for record in self.records]

    def parameters(self, key: str) -> float:
        """Parameters that one token uses at this k."""
        return parameters_at(self.records[0], key)


@dataclass
class Block:
    """Groups that one table or panel compares: one model, dataset, scale, metric and split."""

    model: str
    dataset: str
    scale: str
    metric: str
    split: str
    title: str
    unit: str
    direction: str
    groups: list[Group] = field(default_factory=list)

    @property
    def measure(self) -> str:
        """E.g. ``test BPC (bits per byte, lower is better)``."""
        unit = "" if self.unit.lower() == self.title.lower() else f"{self.unit}, "
        return f"{self.split} {within_a_sentence(self.title)} ({unit}{self.direction} is better)"

    @property
    def name(self) -> str:
        """E.g. ``transformer_xl on enwik8, scale cpu, n = 131,072``."""
        return f"{self.model} on {self.dataset}, scale {self.scale}{self._examples()}"

    def _examples(self) -> str:
        counts = {examples_of(record) for group in self.groups for record in group.records}
        if None not in counts:
            return f", n = {' or '.join(f'{n:,}' for n in sorted(counts))}"
        # Earlier versions recorded the limit that was asked for, not the number of examples.
        for limit in ("eval_tokens", "eval_sequences"):
            limits = [record.get(limit) for group in self.groups for record in group.records]
            if isinstance(limits[0], int) and limits.count(limits[0]) == len(limits):
                return f", {limit} {limits[0]:,}"
        return ""


def blocks_of(records: Sequence[Record]) -> list[Block]:
    """The records, checked, in groups and blocks, in the order given. ValueError when one lacks a field.

    A record that is there twice counts once. Another run of a seed that a group has already is a group of its own.
    """
    if not records:
        raise ValueError("results: there are none; it must be at least one")
    blocks: dict[tuple, Block] = {}
    groups: dict[tuple, Group] = {}
    for number, record in enumerate(records, 1):
        record = check_result(record, f"result {number}")
        metric = record["metrics"][record["metric"]]
        where = [record["model"], dataset_name(record), record["scale"], record["metric"], split_of(record)]
        where += [metric["title"], metric["unit"], metric["direction"]]
        block = blocks.setdefault(tuple(where), Block(*map(plain, where)))
        own_label, settings, sizes = record.get("label"), settings_of(record), _sizes(record)
        key = (*where, record["method"], own_label, *sorted(settings.items()), *sizes.items())
        repeat, seed = 1, record.get("seed")
        while (group := groups.get((*key, repeat))) and record not in group.records and seed in group.seeds:
            repeat += 1  # the same seed with other numbers is no further seed
        if group is None:
            settings |= {} if repeat == 1 else {"run": f"{repeat} of seed {seed}"}
            group = groups[(*key, repeat)] = Group(record["method"], own_label, settings, sizes)
            block.groups.append(group)
        if record not in group.records:
            group.records.append(record)
    for block in blocks.values():
        _name_groups(block.groups)
    return list(blocks.values())


def within_a_sentence(title: str) -> str:
    """A metric's title: ``BPC`` stays as it is, ``Accuracy`` is a word."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def plain(text: Any, longest: int = 100) -> str:
    """One line of text that neither Markdown nor a terminal takes for anything else."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line.translate(str.maketrans("`|<>", "'/()"))
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _name_groups(groups: Sequence[Group]) -> None:
    """Labels each group with its name and what tells it from the others of its block.

    Sizes differ from method to method; they are said where settings leave two groups with one label.
    """
    parts = []
    for group, said in zip(groups, departures([group.settings for group in groups]), strict=True):
        known = (group.own_label or "").split(", ")
        if group.method in METHODS and not METHODS[group.method].routed:
            said = [setting for setting in said if setting.removeprefix("own ").split()[0] not in _OF_EXPERTS]
        parts.append([group.name, *(setting for setting in said if setting not in known)])
    times_used = Counter(map(tuple, parts))
    for group, said in zip(groups, parts, strict=True):
        if times_used[tuple(said)] > 1:
            said = [*said, *(f"{name} {value}" for name, value in group.sizes.items())]
        group.label = plain(", ".join(said))


def departures(settings: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """For each of several settings, by name, those in which it departs from most, as text: ``["steps 3000"]``.

    Where no value is that of most, each says its own. A setting that is missing is said only if most have it.
    """
    parts: list[list[str]] = [[] for _ in settings]
    for name in sorted({name for one in settings for name in one}):
        values = [one.get(name) for one in settings]
        usual, times = Counter(values).most_common(1)[0]
        most = 2 * times > len(values)
        for value, said in zip(values, parts, strict=True):
            if value is None and usual is not None and most:
                said.append(f"own {name}" if name in _OWN else f"{name} not set")
            elif value is not None and (value != usual or not most):
                said.append(f"{name} {value}")
    return parts


def variant_of(method: str, settings: Mapping[str, str]) -> str:
    """In which options a run departs from its method as released, e.g. ``output_scale k``; empty if in none."""
    if method not in METHODS or not METHODS[method].routed:
        return ""
    usual = AS_RELEASED | {"router": METHODS[method].router, "layers": "all", "schedule": METHODS[method].schedule}
    names = [name for name in (*AS_RELEASED, *_VARIED) if settings.get(name) not in (None, usual.get(name))]
    return ", ".join(f"{name} {settings[name]}" for name in names)


def settings_of(record: Record) -> dict[str, str]:
    """The configuration and what it was read with; a field that is null, or as before it came, counts as not there."""
    unsaid = _NO_RESULT | _TOLD_ELSEWHERE
    settings = {name: value for name, value in (record.get("config") or {}).items() if name not in unsaid}
    settings |= {"task": record.get("task"), "precision": record.get("precision"), "n": examples_of(record)}
    settings |= _began_with(record)
    if isinstance(record["dataset"], Mapping):
        for name in ("sha256", "tokenizer.sha256", "splits.train"):
            found: Any = record["dataset"]
            for part in name.split("."):
                found = found.get(part) if isinstance(found, Mapping) else None
            settings[f"dataset.{name}"] = found[:8] if isinstance(found, str) else None
    return {name: _text(value) for name, value in settings.items() if value not in (None, EARLIER.get(name))}


def _began_with(record: Record) -> dict[str, Any]:
    """What a fine-tuning says of the runs that it started from: what is not as usual.

    pretrained_k: how k moved, where not as the method has it. pretrained.scale: another scale. pretrained.start_from:
    the encoder that was adapted. teacher: its method and variant. teacher.d_hidden: the width of its MLPs.
    """
    parts = (record.get("pretrained"), record.get("teacher"), record.get("config"))
    pretrained, teacher, config = (part if isinstance(part, Mapping) else {} for part in parts)
    found = {"teacher": teacher_of(record) or None, "teacher.d_hidden": teacher.get("d_hidden")}
    found["pretrained.start_from"] = pretrained.get("start_from")
    if pretrained.get("scale") != record["scale"]:
        found["pretrained.scale"] = pretrained.get("scale")
    schedule, n = pretrained.get("k_schedule"), pretrained.get("num_experts") or config.get("num_experts")
    method = METHODS.get(record["method"])
    if isinstance(schedule, list) and len(schedule) == 3 and method is not None and isinstance(n, int):
        if schedule != [method.k_min(n), method.k_max(n), method.schedule]:
            found["pretrained_k"] = "{}..{} {}".format(*schedule)
    return found


def teacher_of(record: Record) -> str:
    """Of a distilled model its teacher's method, and what of its weights and scale is not as released; else empty."""
    teacher = record.get("teacher")
    if not isinstance(teacher, Mapping):
        return ""
    given = {name: _text(teacher[name]) for name in AS_RELEASED if teacher.get(name) is not None}
    said = [f"{name} {value}" for name, value in given.items() if value != AS_RELEASED[name]]
    return ", ".join([str(teacher.get("method", "")), *said])


def _sizes(record: Record) -> dict[str, str]:
    return {"parameters": _text(record["parameters"]["total"]), "k": _text(list(values_of(record)))}


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
