"""Which ranks share the experts of a layer, and which ranks hold the same experts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ParallelGroups:
    """The W ranks of a run as W / E expert-parallel groups of E ranks; each group holds every expert once.

    Attributes:
        rank, world_size: this process's rank, and W.
        expert_parallel: E, the number of ranks that share the experts. A group has the consecutive ranks
            E * i .. E * (i + 1) - 1, so it lies within one machine if E is at most the machine's number of GPUs.
        ep_rank: this process's rank within its expert-parallel group; its local experts are
            ``ep_rank * N / E .. (ep_rank + 1) * N / E - 1``.
        ep_group: the process group of its expert-parallel group; None if E = 1.
        expert_data_parallel: W / E, the number of ranks with the same local experts: ep_rank, ep_rank + E, ...
        edp_group: the process group of those ranks; None if there is only one.
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
        """The groups of this run. Every rank calls it, with the same arguments.

        Without an initialized process group it is a single rank.

        Args:
            expert_parallel: E; with 1 every rank holds all experts.
            timeout: seconds (or a timedelta) after which a rank that waits for another one in these groups raises an
                error; None is PyTorch's default (30 minutes for gloo, 10 for NCCL). Operations on the default group
                have the timeout that ``init_process_group`` got.

        Raises:
            ValueError: E does not divide W. All ranks raise it.
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
        num_groups = world_size // expert_parallel
        expert_groups = [range(i * expert_parallel, (i + 1) * expert_parallel) for i in range(num_groups)]
        data_groups = [range(i, world_size, expert_parallel) for i in range(expert_parallel)]
        return cls(
            rank=rank,
            world_size=world_size,
            expert_parallel=expert_parallel,
            ep_rank=rank % expert_parallel,
            ep_group=_own_group(expert_groups, rank, timeout),
            expert_data_parallel=num_groups,
            edp_group=_own_group(data_groups, rank, timeout),
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelGroups:
        return self  # a copied model communicates with the same ranks

    def scatter_experts(self, whole: Tensor) -> Tensor:
        """This rank's shard ``(N / E, ...)`` of a tensor ``(N, ...)`` that holds all experts (a view)."""
        num_local = whole.shape[0] // self.expert_parallel
        return whole[self.ep_rank * num_local : (self.ep_rank + 1) * num_local]


def _own_group(members: list[range], rank: int, timeout: timedelta | None) -> Any:
    """The process group that holds ``rank``. All ranks create all groups, as torch.distributed requires."""
    if len(members[0]) == 1:
        return None
    made = [dist.new_group(list(ranks), timeout=timeout) for ranks in members]
    return next(group for group, ranks in zip(made, members, strict=True) if rank in ranks)


def communication_device(tensor: Tensor) -> torch.device:
    """The device on which ranks can exchange ``tensor``: its own, except that NCCL takes no CPU tensors."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
