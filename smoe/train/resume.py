"""From a run folder back to a run, at any number of processes. A run that is not resumed never comes here."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from smoe.earlier import with_earlier
from smoe.errors import CheckpointError, one_line
from smoe.files import fingerprint, hash_json, write_atomic
from smoe.json_files import load_json, parse_json
from smoe.train.checkpoint import FORMAT, PARTIAL, checkpoint_path, drop_old, list_steps
from smoe.train.config import to_dict
from smoe.train.processes import Processes
from smoe.train.task import Task
from smoe.yaml_files import load_yaml

# What may differ when a run is resumed: where things are and how often they are said, nothing that changes numbers.
MAY_CHANGE = ("data", "scale", "save_interval", "log_interval", "progress", "resume", "run_dir", "scale_reason")
MAY_CHANGE += ("engine", "expert_parallel", "fsdp", "process_timeout", "skip_nonfinite")


class NoRunError(ValueError):
    """A path that is to be a run folder is none."""


def read_config(run: str | Path) -> dict[str, Any]:
    """The recorded configuration of a run as plain data. NoRunError: there is none; ValueError: it is damaged."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise NoRunError(f"run: {run} is not a run folder (no config.yaml in it)")
    return load_yaml(path)


@dataclass
class Checkpoint:
    """A checkpoint's content: ``tensors[group][name]`` on the CPU. ``skipped`` lists newer ones that are damaged."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def load_checkpoint(path: Path, groups: Iterable[str] | None = None) -> Checkpoint:
    """Reads one checkpoint folder after checking every file; ``groups`` limits what is read into memory.

    Raises CheckpointError that says what is wrong.
    """
    try:
        sealed = load_json(path / "state.json")
        content = sealed["content"]
        if hash_json(content) != sealed["sha256"]:
            raise CheckpointError(f"{path.name}: state.json has changed since it was written")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path.name}: format {str(content['format'])[:100]!r}, this version reads {FORMAT}")
        if path != checkpoint_path(path.parent, content["step"]):
            raise CheckpointError(f"{path.name}: is of step {content['step']}")
        for name, expected in content["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{path.name}: {name[:100]!r} is not a file's name")
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise CheckpointError(f"{path.name}: {name} has {size} bytes of {expected['size']}")
            if fingerprint(path / name) != expected:
                raise CheckpointError(f"{path.name}: {name} has changed since it was written")
        present = [name.removesuffix(".safetensors") for name in content["files"]]
        wanted = present if groups is None else [group for group in present if group in set(groups)]
        tensors = {group: load_file(path / f"{group}.safetensors") for group in wanted}
        checkpoint = Checkpoint(content["step"], tensors, content["state"], path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name}: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: cannot be read ({type(error).__name__}: {one_line(error)})") from None
    return checkpoint


def load_latest(folder: Path, groups: Iterable[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when there is none at all.

    Every file is checked against its hash, so all processes choose the same one. Damaged newer ones are listed in
    ``skipped``. Raises CheckpointError when there are only damaged ones.
    """
    skipped: list[tuple[Path, str]] = []
    for step in reversed(list_steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            checkpoint = load_checkpoint(path, groups)
        except CheckpointError as error:
            skipped.append((path, one_line(error)))
        else:
            checkpoint.skipped = skipped
            return checkpoint
    if skipped:
        raise CheckpointError(f"no usable checkpoint in {folder}: {'; '.join(reason for _, reason in skipped)}")
    return None


def newest_checkpoint(folder: Path, processes: Processes) -> Checkpoint | None:
    """The checkpoint that a resumed run goes on from, the same on every process.

    Damaged newer ones are said on stderr and removed: the run is about to write those steps again. Old ones that a kill
    left go too. A run that has lines in metrics.jsonl and no checkpoint starts from its beginning, which is said.
    """
    checkpoint = None
    with processes.together():
        if processes.is_main:
            for left in folder.glob(f"{PARTIAL}*"):  # by an interrupted save
                shutil.rmtree(left, ignore_errors=True)
            checkpoint = load_latest(folder)
    with processes.together():
        if not processes.is_main:
            checkpoint = load_latest(folder)
    processes.agree({"the newest checkpoint": None if checkpoint is None else checkpoint.path.name})
    for path, reason in checkpoint.skipped if checkpoint is not None and processes.is_main else ():
        print(f"warning: {path.name} is damaged ({reason}); going on from {checkpoint.path.name}", file=sys.stderr)
        shutil.rmtree(path, ignore_errors=True)
    if checkpoint is not None and processes.is_main:
        best = checkpoint.state.get("progress", {}).get("best", {})
        drop_old(folder, checkpoint.step, protect={chosen["step"] for chosen in best.values()})
    elif processes.is_main and (lines := read_metrics(folder.parent / "metrics.jsonl")):
        reached = max(line.get("step", 0) for line in lines)
        print(f"no checkpoint in {folder}: the run, which came to step {reached}, starts again at 0", file=sys.stderr)
    return checkpoint


def check_finished(result_path: Path, task: Task) -> None:
    """Raises ValueError if the record of a finished run is of other data than the task's, or can't be read."""
    try:
        record = load_json(result_path)
        if not isinstance(record, dict) or not isinstance(record.get("dataset"), dict):
            raise ValueError("it is no record of a run")
    except ValueError as error:
        raise ValueError(f"{result_path}: {error}; without this file --resume makes it anew") from None
    _check_same_data(record, task, result_path)


def is_of_its_data(recorded: Mapping[str, Any], task: Task) -> bool:
    """Whether a run's state or record, where it says so, is of the task's data. Where they came from may differ."""
    was, now = (
        {name: value for name, value in dataset.items() if name not in ("origin", "note")}
        for dataset in (recorded.get("dataset", task.dataset), task.dataset)
    )
    return was == now


def _check_same_data(recorded: Mapping[str, Any], task: Task, path: Path) -> None:
    if not is_of_its_data(recorded, task):
        was, now = (json.dumps(dataset)[:200] for dataset in (recorded["dataset"], task.dataset))
        raise ValueError(f"data: this run was given {now}, but {path} was trained on {was}")


def restore(checkpoint: Checkpoint, task: Task, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Puts model, optimizer, the task's own state and the generators back where the checkpoint found them.

    Each process finds its generators as it left them where there are as many processes as then. Where there are not,
    they start anew from (seed, step, rank), and that is said. Raises ValueError, before anything changes, for the
    checkpoint of a run with other data or another configuration.
    """
    state, config = checkpoint.state, to_dict(task.config)
    _check_same_data(state, task, checkpoint.path)
    recorded = with_earlier(state.get("config", config), config)
    check_same_config(recorded, config, MAY_CHANGE, checkpoint.path / "state.json")
    if processes.is_main:
        print(f"resumed after step {checkpoint.step}", flush=True)
    load_weights(checkpoint, task, processes)
    moments = processes.shard_state(checkpoint.tensors["optimizer"], task.bare())
    restore_optimizer(optimizer, moments, task.bare())
    task.load_state(checkpoint.tensors.get("task", {}), processes.device)
    before = checkpoint.state["world_size"]
    if before == processes.world_size:
        restore_rng(checkpoint.tensors[f"rng-rank{processes.rank}"])
        return
    seed = f"{task.config.seed}/{checkpoint.step}/{processes.rank}"
    torch.manual_seed(random.Random(seed).getrandbits(63))
    if processes.is_main:
        print(
            f"the checkpoint is of {before} process{'es' if before > 1 else ''}, this run has {processes.world_size}: "
            "random generators start anew from seed, step and rank"
        )


def load_weights(checkpoint: Checkpoint, task: Task, processes: Processes) -> None:
    """Loads a checkpoint's weights into the model, whose experts may be on several processes."""
    task.bare().load_state_dict(processes.shard_state(checkpoint.tensors["model"], task.bare()))


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Puts back what :func:`smoe.train.state.optimizer_tensors` took, bit for bit, in the dtypes it had.

    For a parameter that has never had a gradient there is nothing to put back. Raises ValueError, before anything
    changes, when the checkpoint has a parameter that the model lacks.
    """
    parameters = dict(model.named_parameters())
    kept: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        _, name, key = path.split("/")
        kept.setdefault(name, {})[key] = value
    for name in sorted(kept.keys() - parameters.keys()):
        raise ValueError(f"optimizer: parameter {name!r} is only in the checkpoint")
    for name, values in kept.items():
        device = parameters[name].device
        # A copy: the optimizer changes its own in place.
        optimizer.state[parameters[name]] = {key: value.to(device, copy=True) for key, value in values.items()}


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`smoe.train.state.rng_tensors` returned, a CUDA state where there is a CUDA device."""
    torch.set_rng_state(tensors["torch"].cpu())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].cpu())


def check_same_config(
    recorded: Mapping[str, Any], given: Mapping[str, Any], may_change: Iterable[str], file: Path
) -> None:
    """ValueError naming the field where a resumed run is given another configuration than the one in ``file``."""
    absent = "(absent)"
    for name in [*recorded, *(name for name in given if name not in recorded)]:
        was, now = recorded.get(name, absent), given.get(name, absent)
        if name not in may_change and was != now:
            raise ValueError(
                f"{name}: {now!r} differs from {was!r} in {file}; resume with the recorded one, or start another run"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; one cut off at the end is left out. Empty when there is no file."""
    return [line for _, line in _whole_lines(path)]


def drop_later_lines(path: Path, step: int) -> None:
    """Removes the lines of metrics.jsonl after ``step``, which will be written again, and one cut off by a crash."""
    kept = "".join(text + "\n" for text, line in _whole_lines(path) if line.get("step", 0) <= step)
    if path.exists() and kept.encode() != path.read_bytes():
        write_atomic(path, kept)


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield text.decode(), line
