"""One run on several processes: how they find each other, agree on what to do, and fail together.

    torchrun --nproc_per_node 8 -m transformer_xl.train ...

torchrun tells each process its rank; this joins them. Whatever goes wrong on one of them before or between steps is
said by all, so that none waits for another that is gone; a bound on waiting (``process_timeout``) covers the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from smoe.errors import RunError, one_line
from smoe.parallel import ParallelGroups, check_agreement, fully_shard_model, parallelize
from smoe.run.config import parse_config, to_dict
from smoe.run.trainer_config import PROCESS_TIMEOUT, TrainerConfig

# What processes need not agree on: how a path is called on their machine, what they show.
_OWN = ("data", "progress", "scale_reason")

# torchrun's own store, which outlives the workers; a new one when another machine becomes the first. None: no torchrun.
_agents: dist.Store | None = None
# On rank 0: whether it has seen attempts before this one, and none that opened the run folder.
_none_opened = False
_PORT, _OPENED = "port", "opened"


def run_trainer(
    config_class: type[TrainerConfig], config_dir: Path, train: Callable[[Any], Any], prog: str | None = None
) -> None:
    """The command line of a trainer: its flags, the other processes, then ``train(config)``.

    Restarted by torchrun after a worker died, it goes on from the newest good checkpoint as with ``--resume``; unless
    none of the attempts before has opened the run folder, whose run is another one then.
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
    if _restarted():
        config = dataclasses.replace(config, resume=True)
        note_opened()
    train(config)


def note_opened() -> None:
    """For attempts after this one: the run folder is that of this job (main process)."""
    if _agents is not None:
        _agents.set(_OPENED, "yes")


def _restarted() -> bool:
    """Whether torchrun started any process of a run again: each machine counts its own restarts."""
    own = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), _none_opened
    said = [own]
    if dist.is_available() and dist.is_initialized():
        said = [own] * dist.get_world_size()
        dist.all_gather_object(said, own)
    return any(restarts for restarts, _ in said) and not any(none_opened for _, none_opened in said)


def connect(timeout: float) -> None:
    """Joins the processes that torchrun started; nothing to do without it, or when it is done.

    ``timeout`` in seconds bounds how long one waits for another, here and in whatever they do together.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Accelerate has no other name for what it passes on to DistributedDataParallel.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    limit = timedelta(seconds=timeout)
    store, rank, world_size = next(rendezvous("env://", timeout=limit))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        global _agents, _none_opened
        _agents = dist.PrefixStore("smoe", store)
        _none_opened = rank == 0 and _agents.check([_PORT]) and not _agents.check([_OPENED])
        store = _store_of_this_attempt(_agents, rank, world_size, limit)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=limit)


def _store_of_this_attempt(agents: dist.Store, rank: int, world_size: int, limit: timedelta) -> dist.Store:
    """A store that rank 0 opens. torchrun's own outlives the workers: restarted ones would find in it, and try to
    reach, those that are gone. How often it restarted them is no name for an attempt, since each machine counts alone.
    """
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(host, 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)
        agents.set(_PORT, str(store.port))
        return store
    give_up = time.monotonic() + limit.total_seconds()
    while True:
        port = int(agents.get(_PORT))  # waits for the first one
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, world_size, is_master=False, timeout=limit, wait_for_workers=False)
        except OSError as error:  # that of an attempt before this one
            if time.monotonic() > give_up:
                raise RunError(
                    f"rank 0 on {host} can't be reached after {limit.total_seconds():.0f} s: {error}"
                ) from None
            time.sleep(0.05)


def join(config: TrainerConfig) -> ParallelGroups:
    """This process's place among the others, once all have the same configuration.

    Raises ValueError in one line, on every process, when a field differs, or expert_parallel or fsdp doesn't fit.
    """
    connect(config.process_timeout)
    single = ParallelGroups.create(timeout=config.process_timeout)
    check_agreement({name: value for name, value in to_dict(config).items() if name not in _OWN}, single)
    if config.fsdp and single.world_size == 1:
        raise ValueError("fsdp shards over processes, and this run has 1; start several with torchrun, or leave it out")
    if config.expert_parallel == 1:
        return single
    return ParallelGroups.create(config.expert_parallel, timeout=config.process_timeout)


def spread(
    model: nn.Module, config: TrainerConfig, groups: ParallelGroups, device: torch.device, blocks: Iterable[nn.Module]
) -> None:
    """Puts ``model``, whole and equal everywhere, on ``device``, in place: its experts spread over processes, and with
    FSDP everything sharded, ``blocks`` (the layers) one by one. Before the optimizer."""
    parallelize(model, groups)
    model.to(device)
    if config.fsdp:
        # Nobody changes in place what the model returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        fully_shard_model(model, groups, blocks=blocks)


def keep_from_ddp(accelerator: Any) -> None:
    """Lets Accelerate prepare a model that FSDP has sharded for its precision alone."""
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)


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
