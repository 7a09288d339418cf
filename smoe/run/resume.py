"""Whole checkpoints: what one process or many wrote together, any number of processes can go on from."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smoe.parallel import ParallelGroups, check_agreement, gather_state, shard_state
from smoe.run.checkpoint import Checkpoint, CheckpointWriter, load_latest
from smoe.run.folder import RunFolder
from smoe.run.launch import together
from smoe.run.state import flatten_optimizer, restore_optimizer, restore_rng, rng_tensors
from smoe.run.training import Progress, TrainingRun

_PROGRESS = ("seconds", "best_step", "best_bpc")


def save_run(
    run: TrainingRun,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Writes one checkpoint; every process calls it. The last two and the best one are kept.

    Args:
        model, optimizer: as they are on this process; experts that are spread over processes are written whole.
        tensors, state: what the trainer adds, tensors by group; those of the main process count, so they are whole.
    """
    accelerator, groups, progress = run.accelerator, run.groups, run.progress
    nats = accelerator.reduce(progress.nats.to(accelerator.device), "sum")
    weights = gather_state(model.state_dict(), model, groups)
    moments, plain = flatten_optimizer(optimizer, model.named_parameters())
    moments = gather_state(moments, model, groups)
    writer = CheckpointWriter(run.folder.checkpoints, step)
    with together():
        if groups.is_main:
            writer.begin()
    with together():
        writer.write(_rng_group(groups.rank), rng_tensors())
        for group, members in {"model": weights, "optimizer": moments, **(tensors or {})}.items():
            if groups.is_main:
                writer.write(group, members)
    with together():
        if groups.is_main:
            kept = {"optimizer": plain, "world_size": groups.world_size, "nats": nats.tolist(), **(state or {})}
            kept |= {name: getattr(progress, name) for name in _PROGRESS}
            writer.seal(kept, keep=2, protect=[] if progress.best_step is None else [progress.best_step])


def latest_checkpoint(folder: RunFolder, groups: ParallelGroups, own: tuple[str, ...] = ()) -> Checkpoint | None:
    """The newest good checkpoint, the same on every process; `own` are the groups of tensors that the trainer added.

    Damaged newer ones are said on stderr. None when there is none at all.
    """
    wanted = ["model", "optimizer", *own, _rng_group(groups.rank)]
    checkpoint = None
    with together():
        if groups.is_main:  # first, since it removes what an interrupted save left
            checkpoint = load_latest(folder.checkpoints, groups=wanted, clean=True)
    with together():
        if not groups.is_main:
            checkpoint = load_latest(folder.checkpoints, groups=wanted)
    check_agreement({"the newest checkpoint": None if checkpoint is None else checkpoint.path.name}, groups)
    for path, reason in checkpoint.skipped if checkpoint is not None and groups.is_main else ():
        print(f"warning: {path.name} is damaged ({reason}); going on from {checkpoint.path.name}", file=sys.stderr)
    return checkpoint


def restore_progress(run: TrainingRun, checkpoint: Checkpoint) -> None:
    """Puts back what the run knows of its past; losses since the last line of metrics all go to the main process."""
    run.progress = Progress(**{name: checkpoint.state[name] for name in _PROGRESS})
    if run.groups.is_main:
        run.progress.nats = torch.tensor(checkpoint.state["nats"], dtype=torch.float64)


def restore_run(run: TrainingRun, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts model, optimizer and random generators back where `save_run` found them, on any number of processes.

    Each process finds its generators as it left them where there are as many processes as then. Where there are not,
    they start anew from (seed, step, rank), and that is said.
    """
    state, tensors, groups = checkpoint.state, checkpoint.tensors, run.groups
    load_whole(model, tensors["model"], groups)
    moments = shard_state(tensors["optimizer"], model, groups)
    restore_optimizer(optimizer, moments, state["optimizer"], model.named_parameters())
    if state["world_size"] == groups.world_size:
        restore_rng(tensors[_rng_group(groups.rank)])
    else:
        _seed_generators(f"{run.config.seed}/{checkpoint.step}/{groups.rank}")
        if groups.is_main:
            print(
                f"the checkpoint is of {_processes(state['world_size'])}, this run has {groups.world_size}: random "
                f"generators start anew from seed, step and rank"
            )


def load_whole(model: nn.Module, weights: Mapping[str, Tensor], groups: ParallelGroups) -> None:
    """Loads a checkpoint's weights into `model`, whose experts may be spread over processes."""
    model.load_state_dict(shard_state(weights, model, groups))


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def _seed_generators(text: str) -> None:
    import numpy

    draw = random.Random(text)
    random.seed(draw.getrandbits(64))
    numpy.random.seed(draw.getrandbits(32))
    torch.manual_seed(draw.getrandbits(63))


def _rng_group(rank: int) -> str:
    return f"rng-rank{rank}"
