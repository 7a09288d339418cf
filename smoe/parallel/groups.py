"""Which ranks share the experts of a layer, and which hold the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ParallelGroups:
    """The W ranks of a run as W / E groups of E: within a group every expert lives once.

    Attributes:
        rank, world_size: this process, of W.
        expert_parallel: E, the ranks that share the experts; consecutive ones, E * i .. E * (i + 1) - 1, so that a
            group stays within a machine where E is at most the number of its GPUs.
        ep_rank: this process within its group; it holds experts ``ep_rank * N / E .. (ep_rank + 1) * N / E - 1``.
        ep_group: its process group; None when E = 1.
        expert_data_parallel: W / E, the ranks that hold the same experts as this one: ep_rank, ep_rank + E, ...
        edp_group: their process group; None when there is one such rank.
    """

    rank: int
    world_size: int
    expert_parallel: int
    ep_rank: int
    ep_group: Any
    expert_data_parallel: int
    edp_group: Any

    @classmethod
    def create(cls, expert_parallel: int = 1, timeout: timedelta | float | None = None) -> ParallelGroups:
        """The groups of this run; every rank calls it once, with the same arguments.

        Args:
            expert_parallel: E; 1 spreads nothing.
            timeout: seconds (or a timedelta) after which a rank that waits for another within these groups gives up
                with an error; None takes PyTorch's default (30 minutes for gloo, 10 for NCCL). What the default group
                does is bounded by the timeout given to ``init_process_group``.

        Raises:
            ValueError: E does not divide W, on every rank alike.
        """
        running = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
        if isinstance(expert_parallel, bool) or not isinstance(expert_parallel, int) or expert_parallel < 1:
            raise ValueError(f"expert_parallel is {expert_parallel!r}; it must be a whole number of at least 1")
        if world_size % expert_parallel:
            fitting = ", ".join(str(e) for e in range(1, world_size + 1) if world_size % e == 0)
            raise ValueError(
                f"expert_parallel is {expert_parallel}, which does not divide the {world_size} "
                f"process{'es' if world_size > 1 else ''} of this run; possible are {fitting}"
            )
        if timeout is not None and not isinstance(timeout, timedelta):
            timeout = timedelta(seconds=timeout)
        replicas = world_size // expert_parallel
        shards = [range(i * expert_parallel, (i + 1) * expert_parallel) for i in range(replicas)]
        copies = [range(i, world_size, expert_parallel) for i in range(expert_parallel)]
        return cls(
            rank=rank,
            world_size=world_size,
            expert_parallel=expert_parallel,
            ep_rank=rank % expert_parallel,
            ep_group=_own_group(shards, rank, timeout),
            expert_data_parallel=replicas,
            edp_group=_own_group(copies, rank, timeout),
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelGroups:
        return self  # a copied model talks to the same ranks

    def scatter_experts(self, whole: Tensor) -> Tensor:
        """This rank's slice of a tensor whose first dimension counts all N experts (a view)."""
        share = whole.shape[0] // self.expert_parallel
        return whole[self.ep_rank * share : (self.ep_rank + 1) * share]


def _own_group(members: list[range], rank: int, timeout: timedelta | None) -> Any:
    """The one among the groups that holds ``rank``. All ranks make all groups, as torch.distributed wants it."""
    if len(members[0]) == 1:
        return None
    made = [dist.new_group(list(ranks), timeout=timeout) for ranks in members]
    return next(group for group, ranks in zip(made, members, strict=True) if rank in ranks)


def communication_device(tensor: Tensor) -> torch.device:
    """Where ``tensor`` must be for the ranks to exchange it: NCCL alone takes nothing on the CPU."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
