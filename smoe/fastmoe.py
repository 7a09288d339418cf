"""The experts of an SMoE layer computed by fastmoe's FMoE. Importing this imports ``fmoe``.

FMoE is used as it is: it counts and sorts the (token, expert) pairs, exchanges them between ranks, and takes the
weighted sum. Its gate returns what the layer's router chose, and its fused experts read the layer's own parameters. So
nothing is kept twice: k is that of the routing, a state dict is that of the torch engine, and routers, scores,
``record_routing`` and slimming work as with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import fmoe_cuda
import torch
from fmoe import FMoE
from fmoe.gates.base_gate import BaseGate
from fmoe.linear import MOELinear
from torch import Tensor

from .compute import PATHS, ComputePath
from .compute.products import product_dtype
from .experts import Experts
from .fastmoe_available import kernels_are_compiled
from .router import Routing
from .uncompiled import uncompiled


class ExpertGroups(Protocol):
    """What is read here of :class:`smoe.parallel.ParallelGroups`."""

    expert_parallel: int
    ep_group: Any


class RouterGate(BaseGate):
    """A gate that returns the routing it was given: ``routing`` is set before every pass."""

    routing: Routing | None = None

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int) -> None:
        super().__init__(num_expert, world_size)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, d) -> indices (T, k) int64 and weights (T, k) in the dtype of x.

        Contiguous and in that dtype, because the kernels read the memory as if it were, whatever it is.
        """
        return self.routing.indices.contiguous(), self.routing.weights.to(x.dtype).contiguous()


class FastMoE(FMoE):
    """FMoE as a path of ``smoe.compute``: called with x, experts and routing, it returns the same numbers.

    It has no parameters or buffers of its own. After ``spread`` it also takes tokens to the experts of other ranks.

    Args:
        num_experts: N.
        d_model: d.
    """

    def __init__(self, num_experts: int, d_model: int) -> None:
        super().__init__(num_expert=num_experts, d_model=d_model, gate=RouterGate)
        self.experts = None  # FMoE passes them only to schedules that cannot run fused experts
        self.groups: ExpertGroups | None = None
        self._held: tuple[Experts, ...] = ()  # a tuple, so that they do not become submodules of this module too

    def replace(self, path: ComputePath, x: Tensor) -> ComputePath:
        """With engine ``auto``: this module if ``path`` is ``grouped`` and x is on a CUDA device, else ``path``.

        Both compute one expert after the other, FMoE on several streams. The other paths are left alone: FMoE copies
        every row k times, waits for the device several times per pass, and cannot be compiled.
        """
        fits = path is PATHS["grouped"] and x.device.type == "cuda" and not torch.compiler.is_compiling()
        return self if fits else path

    def spread(self, groups: ExpertGroups) -> FastMoEDispatch:
        """From now on the experts are those of all ranks of ``groups.ep_group``; each rank holds its slice.

        Returns the layer's ``dispatch`` (see :func:`smoe.parallel.parallelize`).
        """
        self.groups, self.world_size = groups, groups.expert_parallel
        return FastMoEDispatch(groups)

    @uncompiled
    def forward(self, x: Tensor, experts: Experts, routing: Routing) -> Tensor:
        """x (T, d) -> y (T, d), the same numbers as ``smoe.compute.reference.compute``.

        y has the dtype of autocast where that is on, else the dtype of x. After ``spread``, ``experts`` are this
        rank's, ``routing`` refers to the experts of all ranks, and every rank of the group makes the call, also one
        without tokens.

        Raises:
            ValueError: x is not on a CUDA device and the kernels are compiled.
        """
        device = x.device.type
        if device != "cuda" and kernels_are_compiled():
            raise ValueError(f"x is on {device}; engine 'fastmoe' computes on CUDA devices only, engine 'torch' on all")
        dtype = product_dtype(x)
        num_tokens = x.shape[0]
        if num_tokens == 0:
            x, routing = _one_token(x, routing)
        with torch.autocast(device, enabled=False):  # the kernels ignore autocast: everything is cast here
            self.num_expert = experts.num_experts  # fewer after slimming or spreading
            self.top_k = self.gate.top_k = routing.indices.shape[1]
            self.gate.routing, self._held = routing, (experts,)
            self.moe_group = None if self.groups is None else self.groups.ep_group
            try:
                return super().forward(x.to(dtype))[:num_tokens]
            finally:  # kept, they would hold the graph of a finished pass; a process group cannot be copied
                self.gate.routing, self._held, self.moe_group = None, (), None

    def expert_fn(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (P, d), sorted by expert, and counts (N / W,) int64 on the CPU -> (P, d). FMoE calls it."""
        (experts,) = self._held
        up = _linear(rows, counts, experts.up, experts.up_bias)
        gate = None if experts.gate is None else _linear(rows, counts, experts.gate, experts.gate_bias)
        return _linear(experts.hidden(up, gate), counts, experts.down.transpose(1, 2), experts.down_bias)


class FastMoEDispatch:
    """The layer's ``dispatch`` where FMoE itself takes tokens to other ranks: it only notes that experts got gradients.

    A token travels once for each of its choices on another rank; ``smoe.parallel.count_bytes`` does not see that.
    """

    def __init__(self, groups: ExpertGroups) -> None:
        self.groups, self.watchers = groups, []
        self.unsynced = False  # read by smoe.parallel, as that of its own Dispatch

    def __call__(self, x: Tensor, routing: Routing, compute: Callable[[Tensor, Routing], Tensor]) -> Tensor:
        y = compute(x, routing)
        if y.requires_grad:
            y.register_hook(self._note)
        return y

    def _note(self, grad: Tensor) -> None:
        self.unsynced = True


_communicator: list[Any] = []


def check_spread(groups: ExpertGroups) -> None:
    """A ValueError if this fmoe cannot exchange tokens within ``groups``; from then on no other groups can be used."""
    if not hasattr(fmoe_cuda, "global_scatter"):
        raise ValueError("expert_parallel needs an fmoe built with NCCL (USE_NCCL=1), or engine 'torch'")
    if _communicator and _communicator[0] is not groups.ep_group:
        raise ValueError(
            "engine 'fastmoe' has one expert-parallel group per process; use the first ParallelGroups again"
        )
    _communicator[:] = [groups.ep_group]


def _linear(rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every expert's rows through its own ``weight (N, out, in)`` and ``bias (N, out)``, in the dtype of the rows."""
    bias = None if bias is None else bias.to(rows.dtype)
    return MOELinear.apply(rows.contiguous(), counts, weight.to(rows.dtype).contiguous(), bias)


def _one_token(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """A token of zeros with weights of 0, for a pass without tokens.

    Kernels cannot run on no rows, other ranks may be waiting for this one, and every parameter must get a gradient.
    """
    indices = torch.arange(routing.indices.shape[1], device=x.device).unsqueeze(0)
    weights = torch.cat([routing.weights, routing.weights.new_zeros(indices.shape)])
    return torch.cat([x, x.new_zeros(1, x.shape[1])]), routing._replace(indices=indices, weights=weights)
