"""The experts of an SMoE layer computed by fastmoe's FMoE. Importing this imports ``fmoe``; see ``smoe.engine``.

FMoE is used as it is: it counts and sorts the (token, expert) pairs, exchanges them between ranks, and takes the
weighted sum. Its gate answers with what the layer's router chose, its fused experts read the layer's own parameters. So
there is nothing to keep in step: k is that of the routing, a state dict is that of the torch engine, and routers,
scores, recording and slimming work as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import fmoe_cuda
import torch
from fmoe import FMoE
from fmoe.gates.base_gate import BaseGate
from fmoe.linear import MOELinear
from torch import Tensor

from .engine import kernels_are_compiled
from .experts import Experts
from .router import Routing

if TYPE_CHECKING:
    from .parallel import ParallelGroups


class RouterGate(BaseGate):
    """A gate that has been told where the tokens go: ``routing`` is set for every pass."""

    routing: Routing | None = None

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int) -> None:
        super().__init__(num_expert, world_size)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, d) -> indices (T, k) int64 and weights (T, k) in the dtype of x.

        The kernels read memory as if it were contiguous, and scores of another dtype as if they had this one.
        """
        return self.routing.indices.contiguous(), self.routing.weights.to(x.dtype).contiguous()


class FastMoE(FMoE):
    """FMoE for the experts and the routing it is called with: ``smoe.compute``'s signature, and its numbers.

    Without parameters or buffers of its own. Once it is ``spread``, it takes tokens to the experts of other ranks too.

    Args:
        num_experts: N. d_model: d.
    """

    def __init__(self, num_experts: int, d_model: int) -> None:
        super().__init__(num_expert=num_experts, d_model=d_model, gate=RouterGate)
        self.experts = None  # FMoE hands them on, but only to schedules that fused experts can't have
        self.groups: ParallelGroups | None = None
        self._held: tuple[Experts, ...] = ()  # in a tuple, lest they become this module's too

    def spread(self, groups: ParallelGroups) -> FastMoEDispatch:
        """From now on the experts are those of all ranks of ``groups.ep_group``, each rank holding its slice.

        Returns what :func:`smoe.parallel.parallelize` gives the layer for its dispatch.
        """
        self.groups, self.world_size = groups, groups.expert_parallel
        return FastMoEDispatch(groups)

    def forward(self, x: Tensor, experts: Experts, routing: Routing) -> Tensor:
        """x (T, d) -> y (T, d), the same numbers as ``smoe.compute.reference.compute``.

        In the dtype of autocast where it is on, else of x. If spread, ``experts`` are this rank's, ``routing`` speaks
        of all, and all ranks of the group call it, a rank without tokens too.
        """
        if torch.compiler.is_compiling():
            return self._run_uncompiled(x, experts, routing)
        return self._run(x, experts, routing)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler
    def _run_uncompiled(self, x: Tensor, experts: Experts, routing: Routing) -> Tensor:
        return self._run(x, experts, routing)

    def _run(self, x: Tensor, experts: Experts, routing: Routing) -> Tensor:
        device = x.device.type
        if device != "cuda" and kernels_are_compiled():
            raise ValueError(f"x is on {device}; engine 'fastmoe' computes on CUDA devices alone, 'torch' on all")
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        num_tokens = x.shape[0]
        if num_tokens == 0:
            x, routing = _one_token(x, routing)
        with torch.autocast(device, enabled=False):  # the kernels don't follow it: everything is cast here
            self.num_expert = experts.num_experts  # slimming and spreading make them fewer
            self.top_k = self.gate.top_k = routing.indices.shape[1]
            self.gate.routing, self._held = routing, (experts,)
            self.moe_group = None if self.groups is None else self.groups.ep_group
            try:
                return super().forward(x.to(dtype))[:num_tokens]
            finally:  # a finished pass would keep its graph, and a process group can't be copied
                self.gate.routing, self._held, self.moe_group = None, (), None

    def expert_fn(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (P, d), sorted by expert, counts (N / W,) int64 on the CPU -> (P, d); FMoE calls it."""
        (experts,) = self._held
        hidden = _linear(rows, counts, experts.up, experts.up_bias)
        if experts.gate is None:
            hidden = experts.activation(hidden)
        else:
            hidden = experts.activation(_linear(rows, counts, experts.gate, experts.gate_bias)) * hidden
        return _linear(hidden, counts, experts.down.transpose(1, 2), experts.down_bias)


class FastMoEDispatch:
    """A layer's dispatch where FMoE itself takes tokens to other ranks: it only knows when experts got gradients.

    A token travels once for each of its choices on another rank; ``smoe.parallel.count_bytes`` does not see it.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self.groups, self.watchers = groups, []
        self.unsynced = False  # as that of smoe.parallel.dispatch.Dispatch

    def __call__(self, x: Tensor, routing: Routing, compute: Callable[[Tensor, Routing], Tensor]) -> Tensor:
        y = compute(x, routing)
        if y.requires_grad:
            y.register_hook(self._note)
        return y

    def _note(self, grad: Tensor) -> None:
        self.unsynced = True


_communicator: list[Any] = []


def check_spread(groups: ParallelGroups) -> None:
    """A ValueError if this fmoe can't exchange tokens within ``groups``; else they are the only ones from now on."""
    if not hasattr(fmoe_cuda, "global_scatter"):
        raise ValueError("expert_parallel needs an fmoe that was built with NCCL (USE_NCCL=1), or engine 'torch'")
    if _communicator and _communicator[0] is not groups.ep_group:
        raise ValueError("engine 'fastmoe' has one expert-parallel group a process; use the first ParallelGroups again")
    _communicator[:] = [groups.ep_group]


def _linear(rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every expert's rows through its own ``weight (N, out, in)`` and ``bias (N, out)``, in the dtype of the rows."""
    bias = None if bias is None else bias.to(rows.dtype)
    return MOELinear.apply(rows.contiguous(), counts, weight.to(rows.dtype).contiguous(), bias)


def _one_token(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """A token of zeros with weights of 0 for a pass that has none.

    Kernels can't be launched on nothing, other ranks may be waiting for this one, and all parameters get a gradient.
    """
    indices = torch.arange(routing.indices.shape[1], device=x.device).unsqueeze(0)
    weights = routing.weights.new_zeros(indices.shape)
    return torch.cat([x, x.new_zeros(1, x.shape[1])]), routing._replace(
        indices=indices, weights=torch.cat([routing.weights, weights])
    )
