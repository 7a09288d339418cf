"""One run on several processes: how they find each other, agree on what to do, and fail together.

    torchrun --nproc_per_node 8 -m transformer_xl.train ...

torchrun tells each process its rank; this joins them. Whatever goes wrong on one of them before or between steps is
said by all, so that none waits for another that is gone; a bound on waiting (``process_timeout``) covers the rest.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from smoe.parallel import ParallelGroups, check_agreement
from smoe.run.config import parse_config, to_dict
from smoe.run.errors import RunError, one_line
from smoe.run.trainer_config import PROCESS_TIMEOUT, TrainerConfig

# What processes need not agree on: how a path is called on their machine, what they show.
_OWN = ("data", "progress", "scale_reason")


def run_trainer(
    config_class: type[TrainerConfig], config_dir: Path, train: Callable[[Any], Any], prog: str | None = None
) -> None:
    """The command line of a trainer: its flags, the other processes, then ``train(config)``.

    Restarted by torchrun after a worker died, it goes on from the newest good checkpoint as with ``--resume``.
    """
    config, error = None, None
    try:
        config = parse_config(config_class, config_dir, prog=prog)
    except ValueError as caught:
        error = caught
    connect(PROCESS_TIMEOUT if config is None else config.process_timeout)
    with together():
        if error is not None:
            raise error
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        config = dataclasses.replace(config, resume=True)
    train(config)


def connect(timeout: float) -> None:
    """Joins the processes that torchrun started; nothing to do for a single one, or when it is done.

    ``timeout`` in seconds bounds how long one waits for another, here and in whatever they do together.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))


def join(config: TrainerConfig) -> ParallelGroups:
    """This process's place among the others, once all have the same configuration.

    Raises ValueError in one line, on every process, when a field differs or expert_parallel doesn't fit.
    """
    connect(config.process_timeout)
    single = ParallelGroups.create(timeout=config.process_timeout)
    check_agreement({name: value for name, value in to_dict(config).items() if name not in _OWN}, single)
    if config.expert_parallel == 1:
        return single
    return ParallelGroups.create(config.expert_parallel, timeout=config.process_timeout)


@contextmanager
def together() -> Iterator[None]:
    """What is in the block works on every process, or fails on every process, and nobody leaves it before all do.

    The block must not wait for other processes itself. The one where it failed raises its own error, the others one
    of the same kind that names it.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if dist.is_available() and dist.is_initialized():
        said: list[Any] = [None] * dist.get_world_size()
        own = None if error is None else (isinstance(error, ValueError), one_line(error))
        dist.all_gather_object(said, own)
        if error is None:
            for rank, (mistake, message) in ((rank, other) for rank, other in enumerate(said) if other is not None):
                raise (ValueError if mistake else RunError)(f"rank {rank}: {message}")
    if error is not None:
        raise error


def leave() -> None:
    """Parts from the other processes, once all have come this far."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
