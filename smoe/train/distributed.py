"""A run of several processes: how they find each other, agree on what to do, and fail together.

    torchrun --nproc_per_node 8 -m transformer_xl.train ...

torchrun tells each process its rank. Whatever goes wrong on one of them before or between steps is said by all, so that
none waits for another that is gone; a bound on waiting (``process_timeout``) covers the rest.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from smoe.errors import RunError, one_line
from smoe.parallel import (
    ParallelGroups,
    check_agreement,
    clip_grad_norm_,
    fully_shard_model,
    gather_state,
    parallelize,
    shard_state,
)
from smoe.train.config import TrainConfig, to_dict
from smoe.train.launcher import end_with_launcher
from smoe.train.processes import Processes

# Fields that may differ between processes: where a path is on their machine, what they show.
_OWN = ("data", "progress", "scale_reason")
_PORT, _OPENED = "port", "opened"


class DistributedProcesses(Processes):
    """One of the processes that torchrun started.

    Restarted by torchrun after a worker died, a run goes on from its newest good checkpoint as with ``--resume``. If no
    attempt before has opened the run folder, it holds another run, and ``--resume`` is not implied.
    """

    def __init__(self, timeout: float) -> None:
        # torchrun's own store, which outlives the workers; a new one when another machine becomes the first.
        self._agents: dist.Store | None = None
        # On rank 0: whether it has seen attempts before this one, and none that opened the run folder.
        self._none_opened = False
        end_with_launcher()
        self._connect(timedelta(seconds=timeout))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.restarted = self._was_restarted()

    def _connect(self, limit: timedelta) -> None:
        if dist.is_initialized():
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # Accelerate has no other name for what it passes on to DistributedDataParallel.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        store, rank, world_size = next(rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            self._agents = dist.PrefixStore("smoe", store)
            self._none_opened = rank == 0 and self._agents.check([_PORT]) and not self._agents.check([_OPENED])
            store = _store_of_this_attempt(self._agents, rank, world_size, limit)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)

    def _was_restarted(self) -> bool:
        """Whether torchrun started any process of a run again: each machine counts its own restarts."""
        own = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), self._none_opened
        said = [own] * self.world_size
        dist.all_gather_object(said, own)
        return any(restarts for restarts, _ in said) and not any(none_opened for _, none_opened in said)

    def opened(self) -> None:
        if self.is_main and self._agents is not None:
            self._agents.set(_OPENED, "yes")

    def configure(self, config: TrainConfig) -> None:
        timeout = config.process_timeout
        self.groups = ParallelGroups.create(timeout=timeout)
        self.agree({name: value for name, value in to_dict(config).items() if name not in _OWN})
        if config.fsdp and self.world_size == 1:
            super().configure(config)  # says so
        if config.expert_parallel > 1:
            self.groups = ParallelGroups.create(config.expert_parallel, timeout=timeout)
        self._make_accelerator(config)

    @contextmanager
    def together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        said: list[Any] = [None] * self.world_size
        own = None if error is None else (isinstance(error, ValueError), one_line(error))
        dist.all_gather_object(said, own)
        if error is not None:
            raise error
        for rank, other in enumerate(said):
            if other is not None:
                bad_input, message = other
                raise (ValueError if bad_input else RunError)(f"rank {rank}: {message}")

    def agree(self, values: Mapping[str, Any]) -> None:
        check_agreement(values, self.groups)

    def prepare(self, model: nn.Module, blocks: Iterable[nn.Module], fsdp: bool) -> nn.Module:
        parallelize(model, self.groups)
        model.to(self.device)
        if fsdp:
            # Nobody changes in place what the model returns.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
            fully_shard_model(model, self.groups, blocks=blocks)
        # evaluation_mode: Accelerate sets the precision and leaves out DDP, which a sharded model must not have.
        return self.accelerator.prepare_model(model, evaluation_mode=fsdp)

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        # DDP would stop at the next step, with a long message that names no parameter.
        if unreached := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]:
            raise ValueError(
                f"{', '.join(unreached)} got no gradient: the loss does not depend on it; with several processes every "
                "trainable parameter must have one, so freeze it with requires_grad_(False)"
            )
        return clip_grad_norm_(model, max_norm, self.groups)

    def join(self, own: Mapping[str, Any]) -> dict[str, Any]:
        entries: list[Any] = [None] * self.world_size
        dist.all_gather_object(entries, dict(own))
        return {name: value for part in entries for name, value in part.items()}

    def gather_state(self, tensors: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor] | None:
        return gather_state(tensors, model, self.groups)

    def shard_state(self, whole: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        return shard_state(whole, model, self.groups)

    def leave(self) -> None:
        dist.barrier()  # the group stays until the process ends: see smoe.errors


def _store_of_this_attempt(agents: dist.Store, rank: int, world_size: int, limit: timedelta) -> dist.Store:
    """A store that rank 0 opens. torchrun's own outlives the workers: restarted ones would find in it, and try to
    reach, those that are gone. The number of restarts can't name an attempt, since each machine counts alone.
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
