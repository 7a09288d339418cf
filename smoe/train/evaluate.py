"""The command that measures a finished or stopped run at any number of activated experts, for every task.

python -m transformer_xl.evaluate RUN --k 1 2 4 8 16 [--split test] [--json]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from smoe.errors import CheckpointError, Parser
from smoe.router import check_top_k
from smoe.train.checkpoint import checkpoint_path
from smoe.train.config import TrainConfig
from smoe.train.evaluation import k_name, measure
from smoe.train.folder import RunFolder
from smoe.train.processes import Processes
from smoe.train.resume import Checkpoint, is_of_its_data, load_checkpoint, load_latest, load_weights, read_config
from smoe.train.task import Task

# A run is measured by one process, whatever trained it, from its own folder alone.
_HERE = {"engine": "auto", "expert_parallel": 1, "fsdp": False, "run": None, "tokenizer": None}
_HERE |= {"keep": None, "vote_score": None, "vote_batches": None, "start_from": None, "teacher": None}

Config = TypeVar("Config", bound=TrainConfig)


def read_run(path: str | Path, config_class: type[Config], what: str, which: str = "best") -> tuple[Config, Checkpoint]:
    """The configuration of a run and one of its checkpoints, the weights alone.

    A field that the run's version did not have yet takes its default; engine, processes and the run folder's place are
    those of this machine. A damaged newest checkpoint is said on stderr.

    Args:
        what: a model of this kind, for messages, e.g. ``a Transformer-XL``. which: ``best`` or ``last``.

    Raises ValueError when ``path`` holds no run of this kind, CheckpointError when no checkpoint can be read.
    """
    folder = RunFolder(path)
    config = _read_config(folder, config_class, what)
    latest = load_latest(folder.checkpoints, groups=["model"])
    if latest is None:
        raise CheckpointError(f"run {folder.path} has no checkpoint yet")
    for damaged, reason in latest.skipped:
        print(f"warning: {damaged.name} is damaged ({reason}); going by {latest.path.name}", file=sys.stderr)
    best = latest.state["progress"]["best"].get(k_name(config.eval_ks()[0]))
    if which == "best" and best is not None and best["step"] != latest.step:
        return config, load_checkpoint(checkpoint_path(folder.checkpoints, best["step"]), groups=["model"])
    return config, latest


def _read_config(folder: RunFolder, config_class: type[Config], what: str) -> Config:
    recorded = read_config(folder.path)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = sorted(recorded.keys() - fields.keys())
    missing = [name for name, field in fields.items() if name not in recorded and field.default is dataclasses.MISSING]
    for name in (*unknown, *missing):
        has = "has" if name in recorded else "lacks"
        raise ValueError(
            f"run: {folder.config_path} is not of {what} of this version or is of another task: it {has} {name}"
        )
    hints = get_type_hints(config_class)
    values = {
        name: tuple(value) if isinstance(value, list) and _takes_tuple(hints[name]) else value
        for name, value in recorded.items()
    }
    here = {name: value for name, value in _HERE.items() if name in fields}
    try:
        return config_class(**values | here | {"run_dir": str(folder.path)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"run: {folder.config_path} is not of {what}: {error}") from None


def _takes_tuple(hint: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))


def read_task(
    path: str | Path, tasks: Sequence[type[Task]], what: str, which: str = "best"
) -> tuple[type[Task], TrainConfig, Checkpoint]:
    """Which of ``tasks`` a run is of, and what :func:`read_run` says of it.

    A run of an earlier version lacks fields; the task with the fewest that it lacks is its own. Of tasks with the same
    fields it is the one that the checkpoint names.

    Raises ValueError as :func:`read_run`, and when the run is of another task.
    """
    recorded = read_config(path).keys()
    fields = {task: {field.name for field in dataclasses.fields(task.config_class)} for task in tasks}
    fitting = sorted((task for task in tasks if recorded <= fields[task]), key=lambda task: len(fields[task]))
    task = fitting[0] if fitting else tasks[0]
    config, checkpoint = read_run(path, task.config_class, what, which)
    name = checkpoint.state.get("task", task.name)  # of an earlier version: unknown
    if name == task.name:
        return task, config, checkpoint
    for other in fitting:
        if other.name == name:
            return other, *read_run(path, other.config_class, what, which)
    names = ", ".join(task.name for task in tasks)
    raise ValueError(f"run: {path} is of the task {name}; it must be of {names}")


def load_task(task_class: type[Task], config: TrainConfig, checkpoint: Checkpoint, processes: Processes) -> Task:
    """The task of a run, with a checkpoint's weights, on the device. Other data than the run's are said on stderr.

    Raises ValueError for data that can't be used, or of another vocabulary.
    """
    config = config.resolved()
    processes.configure(config)
    task = task_class(config, 0, 1)
    if task.facts != checkpoint.state["facts"]:
        raise ValueError("data: it has another vocabulary than the run; give the run's with --data")
    if not is_of_its_data(checkpoint.state, task):
        where = getattr(config, "data", "the data")
        print(f"warning: {where} holds other data than the run was trained on; --data names others", file=sys.stderr)
    load_weights(checkpoint, task, processes)
    task.model.to(processes.device)
    return task


def evaluation_command(*tasks: type[Task], prog: str, what: str, argv: Sequence[str] | None = None) -> None:
    """``python -m MODULE RUN [--k ...] [--split ...] [--data ...] [--checkpoint ...] [--LIMIT n] [--json]``.

    Args:
        tasks: those that a run may be of. LIMIT is ``tokens`` or ``sequences`` where a task has ``eval_LIMIT``.
        what: as in :func:`read_run`.
    """
    fields = {task: {field.name for field in dataclasses.fields(task.config_class)} for task in tasks}
    limits = [name for name in ("tokens", "sequences") if any(f"eval_{name}" in names for names in fields.values())]
    parser = Parser(prog=prog, description="Measures a finished or stopped run at any k.")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--k", type=int, nargs="+", help="numbers of activated experts (default: the run's sweep)")
    splits = list(dict.fromkeys(split for task in tasks for split in task.splits))
    parser.add_argument("--split", choices=splits, help="(default: test, where there is one)")
    if any("data" in names for names in fields.values()):
        parser.add_argument("--data", help="the folder with the splits (default: the run's)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    for limit in limits:
        parser.add_argument(f"--{limit}", type=int, help="evaluate on so many (default: as the run did; 0: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    arguments = parser.parse_args(argv)

    task_class, config, checkpoint = read_task(arguments.run, tasks, what, arguments.checkpoint)
    changes = {"data": arguments.data} if getattr(arguments, "data", None) is not None else {}
    for limit in limits:
        count = getattr(arguments, limit)
        if count is None:
            continue
        if f"eval_{limit}" not in fields[task_class]:
            raise ValueError(f"{limit} has no effect on a run of the task {task_class.name}; leave it out")
        if count < 0:
            raise ValueError(f"{limit} is {count}; it must be 0 (all) or more")
        changes[f"eval_{limit}"] = count or None
    if arguments.k and not config.get_method().routed:
        raise ValueError(f"k is {arguments.k}; {config.method} is dense and has no experts to choose from")
    ks = [check_top_k(k, config.num_experts) for k in arguments.k] if arguments.k else config.sweep_ks()
    split = arguments.split or task_class.reported_split()
    if split not in task_class.splits:
        raise ValueError(f"split is {split!r}; the task {task_class.name} has {', '.join(task_class.splits)}")

    processes = Processes()
    task = load_task(task_class, dataclasses.replace(config, **changes), checkpoint, processes)

    report: dict[str, Any] = {"run": str(arguments.run), "step": checkpoint.step, "split": split}
    report |= {"metric": task.metrics[0].key} | {metric.key: {} for metric in task.metrics}
    for k in ks:
        measured = measure(task, split, k, processes)
        report["n"] = measured.n
        for key, value in measured.values.items():
            report[key][k_name(k)] = value
        if not arguments.json:
            name = "dense" if k is None else f"k = {k:2}"
            print(f"{name}: {split} {task.metrics[0].shown(measured.values)}", flush=True)
    if arguments.json:
        print(json.dumps(report, indent=2))
