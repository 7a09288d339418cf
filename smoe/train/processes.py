"""The processes of a run, seen from one of them. Here: the only one. ``distributed.py`` has the run of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from smoe.train.config import TrainConfig


class Processes:
    """The single process of a run. What several have to do together is a method; alone, most do nothing."""

    rank, world_size = 0, 1  # this process, and how many there are
    device: torch.device  # where it computes; known after configure()
    restarted = False  # whether torchrun started the run again after a process died

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def configure(self, config: TrainConfig) -> None:
        """Checks that all processes have ``config``, and that it fits their number; picks the device."""
        if config.fsdp:
            raise ValueError("fsdp shards over processes; this run has 1: start several with torchrun, or leave it out")
        if config.expert_parallel > 1:
            raise ValueError(f"expert_parallel is {config.expert_parallel}; it must be 1, this run has 1 process")
        self._make_accelerator(config)

    def _make_accelerator(self, config: TrainConfig) -> None:
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            # Fixed routers are the only buffers, equal everywhere by their seed. Sending them at every pass would
            # change them in place between THOR's two passes.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device = self.accelerator.device

    def together(self) -> AbstractContextManager[None]:
        """The block, which waits for nobody itself, works or fails on all processes; nobody leaves it before all do."""
        return nullcontext()

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raises a ValueError on every process if ``values`` differ between them."""

    def opened(self) -> None:
        """Notes for later restarts that this job has opened its run folder."""

    def prepare(self, model: nn.Module, blocks: Iterable[nn.Module], fsdp: bool) -> nn.Module:
        """Puts ``model`` on the device; returns what to call for a pass. ``fsdp`` shards its ``blocks`` one by one."""
        return self.accelerator.prepare_model(model.to(self.device))

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scales the gradients so that their 2-norm over the whole model is at most ``max_norm``; returns the norm."""
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each."""
        return self.accelerator.reduce(tensor.to(self.device), "sum")

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, joined along the first dimension in the order of the ranks, on each."""
        return self.accelerator.gather(tensor)

    def join(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of all processes, in the order of the ranks, on each."""
        return dict(own)

    def gather_state(self, tensors: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor] | None:
        """Whole tensors of a state dict or an optimizer's state, on the main process."""
        return tensors

    def shard_state(self, whole: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        """This process's part of whole tensors."""
        return whole

    def leave(self) -> None:
        """Waits until all processes have come this far; none needs another after it."""
