"""Whole checkpoints: what one process or many wrote together, any number of processes can go on from."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smoe.run.checkpoint import Checkpoint, CheckpointWriter, load_latest
from smoe.run.folder import RunFolder
from smoe.run.state import flatten_optimizer, restore_optimizer, restore_rng, rng_tensors
from smoe.run.training import Progress

_PROGRESS = ("seconds", "best_step", "best_bpc")


def save_run(
    folder: RunFolder,
    step: int,
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Writes one checkpoint; every process calls it. The last two and the best one are kept.

    `tensors` (by group) and `state` are what the trainer adds; those of the main process count, so they are whole.
    """
    writer, is_main = CheckpointWriter(folder.checkpoints, step), accelerator.is_main_process
    nats = accelerator.reduce(progress.nats.to(accelerator.device), "sum")
    if is_main:
        writer.begin()
    accelerator.wait_for_everyone()
    writer.write(_rng_group(accelerator.process_index), rng_tensors())
    if is_main:
        moments, plain = flatten_optimizer(optimizer, model.named_parameters())
        for group, members in {"model": model.state_dict(), "optimizer": moments, **(tensors or {})}.items():
            writer.write(group, members)
    accelerator.wait_for_everyone()
    if is_main:
        kept = {"optimizer": plain, "world_size": accelerator.num_processes, "nats": nats.tolist(), **(state or {})}
        kept |= {name: getattr(progress, name) for name in _PROGRESS}
        writer.seal(kept, keep=2, protect=[] if progress.best_step is None else [progress.best_step])
    accelerator.wait_for_everyone()


def latest_checkpoint(folder: RunFolder, accelerator: Any, groups: tuple[str, ...] = ()) -> Checkpoint | None:
    """The newest good checkpoint, the same on every process; `groups` are those that the trainer added.

    Damaged newer ones are said on stderr. None when there is none at all.
    """
    wanted = ["model", "optimizer", *groups, _rng_group(accelerator.process_index)]
    if accelerator.is_main_process:  # first, since it removes what an interrupted save left
        checkpoint = load_latest(folder.checkpoints, groups=wanted, clean=True)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        checkpoint = load_latest(folder.checkpoints, groups=wanted)
    for path, reason in checkpoint.skipped if checkpoint is not None and accelerator.is_main_process else ():
        print(f"warning: {path.name} is damaged ({reason}); going on from {checkpoint.path.name}", file=sys.stderr)
    return checkpoint


def saved_progress(checkpoint: Checkpoint, accelerator: Any) -> Progress:
    """What `save_run` was given; the losses since the last line of metrics all count as the main process's."""
    progress = Progress(**{name: checkpoint.state[name] for name in _PROGRESS})
    if accelerator.is_main_process:
        progress.nats = torch.tensor(checkpoint.state["nats"], dtype=torch.float64)
    return progress


def restore_run(
    checkpoint: Checkpoint,
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> None:
    """Puts model, optimizer and random generators back where `save_run` found them.

    Each process finds its generators as it left them where there are as many processes as then. Where there are not,
    they start anew from (seed, step, rank), and that is said.
    """
    state, tensors, rank = checkpoint.state, checkpoint.tensors, accelerator.process_index
    model.load_state_dict(tensors["model"])
    restore_optimizer(optimizer, tensors["optimizer"], state["optimizer"], model.named_parameters())
    saved, here = state["world_size"], accelerator.num_processes
    if saved == here:
        restore_rng(tensors[_rng_group(rank)])
    else:
        _seed_generators(f"{seed}/{checkpoint.step}/{rank}")
        if accelerator.is_main_process:
            print(f"the checkpoint is of {saved} processes, this run of {here}: random generators start anew")


def _seed_generators(text: str) -> None:
    import numpy

    draw = random.Random(text)
    random.seed(draw.getrandbits(64))
    numpy.random.seed(draw.getrandbits(32))
    torch.manual_seed(draw.getrandbits(63))


def _rng_group(rank: int) -> str:
    return f"rng-rank{rank}"
