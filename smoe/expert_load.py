"""How evenly a model's tokens load its experts, counted while it trains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .control import smoe_layers
from .router import Router, Routing


class LayerLoad(NamedTuple):
    """The load of one layer. Its shares are those of all choices, one for each token and each of its k experts.

    entropy: of the shares, divided by log N: 1 if all experts are chosen as often, 0 if only one is ever chosen.
    busiest: the largest share; 1 / N if all are chosen as often.
    dead: how many experts nobody chose.
    balance_loss: Switch's (see ``smoe.balance_loss``), mean over the passes; None without a learned router.
    """

    entropy: float
    busiest: float
    dead: int
    balance_loss: float | None


class ExpertLoad:
    """Counts, within a ``with`` block, how often each expert is chosen while a model trains.

    ``read()`` returns what was counted since it was last called, so one reading covers all passes of several steps,
    whether they accumulate gradients, are compiled, or have a k per row. Only modules in training mode count;
    evaluations in between do not. Padding counts, because the experts compute it. A pass costs one addition of
    integers per layer on the device of the model, a reading one transfer to the CPU. Under ``torch.compile`` the graph
    breaks at every router meanwhile. Passes that activation checkpointing repeats count twice, which changes no share.

    Raises:
        ValueError: the model has no SMoE layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._counters: dict[str, _Counter] = {}
        self._watched: list[tuple[Router, _Watcher]] = []
        seen: set[int] = set()
        for name, layer in smoe_layers(model):
            # A router that PEFT has wrapped and its trained copies are one layer's; a shared one is the first layer's.
            routers = [router for router in layer.routers if id(router) not in seen]
            if routers:
                seen |= {id(router) for router in routers}
                counter = self._counters[name] = _Counter(layer.num_experts)
                self._watched += [(router, _Watcher(router, counter)) for router in routers]
        if not seen:
            raise ValueError(f"{type(model).__name__} has no SMoE layer; there is no load to count")

    def __enter__(self) -> ExpertLoad:
        for router, watcher in self._watched:
            router.watch(watcher)
        return self

    def __exit__(self, *error: object) -> None:
        for router, watcher in self._watched:
            router.unwatch(watcher)

    def read(self, *, all_ranks: bool = False) -> dict[str, LayerLoad]:
        """The load of every layer that was used since the last reading, by name; counting starts anew.

        Args:
            all_ranks: adds up the counts of all ranks of ``torch.distributed``, each of which has to call this.
        """
        values = torch.cat([counter.values() for counter in self._counters.values()])  # on the CPU
        if all_ranks:
            values = _sum_over_ranks(values)
        loads, start = {}, 0
        for name, counter in self._counters.items():
            end = start + counter.num_experts
            load = _layer_load(values[start:end].tolist(), *values[end : end + 2].tolist())
            if load is not None:
                loads[name] = load
            start = end + 2
            counter.clear()
        return loads


def mean_load(loads: dict[str, LayerLoad]) -> dict[str, float]:
    """A few numbers for all layers of a reading; nothing for an empty one.

    ``expert_entropy``: mean over the layers; ``busiest_expert``: the largest share in any layer; ``dead_experts``: in
    all layers together; ``balance_loss``: sum over the layers that have one.
    """
    if not loads:
        return {}
    numbers = {
        "expert_entropy": sum(load.entropy for load in loads.values()) / len(loads),
        "busiest_expert": max(load.busiest for load in loads.values()),
        "dead_experts": sum(load.dead for load in loads.values()),
    }
    balance = [load.balance_loss for load in loads.values() if load.balance_loss is not None]
    return {**numbers, "balance_loss": sum(balance)} if balance else numbers


class _Counter:
    """How often each of N experts was chosen, and the sum of the passes' balance losses."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.clear()

    def clear(self) -> None:
        self._counts: Tensor | None = None
        self._balance: Tensor | None = None
        self._passes = 0  # with a balance loss

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        chosen = routing.indices.detach().reshape(-1)
        if self._counts is None:
            self._counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=chosen.device)
        # One place further: the first is for the empty slots, -1. Unlike bincount it does not wait for the device.
        chosen = chosen.to(self._counts.device) + 1
        self._counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        if routing.balance_loss is not None:
            balance = routing.balance_loss.detach().to(self._counts.device, torch.float32)
            self._balance = balance.clone() if self._balance is None else self._balance + balance
            self._passes += 1

    def values(self) -> Tensor:
        """(N + 2,) float64 on the CPU: the counts, the sum of the balance losses, and of how many passes it is."""
        values = torch.zeros(self.num_experts + 2, dtype=torch.float64)
        if self._counts is not None:
            values[: self.num_experts] = self._counts[1:].cpu()
        if self._balance is not None:
            values[-2] = self._balance.cpu()
            values[-1] = self._passes
        return values


class _Watcher:
    """What a router tells its passes to (``Router.watch``): counted instead of kept."""

    def __init__(self, router: Router, counter: _Counter) -> None:
        self._router, self._counter = router, counter

    def append(self, routing: Routing) -> None:
        if self._router.training:
            self._counter.add(routing)


def _sum_over_ranks(values: Tensor) -> Tensor:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else values.device
    values = values.to(device)
    dist.all_reduce(values)
    return values.cpu()


def _layer_load(counts: list[float], balance: float, passes: float) -> LayerLoad | None:
    total = sum(counts)
    if not total:
        return None
    shares = [count / total for count in counts]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return LayerLoad(
        entropy=entropy / math.log(len(shares)) if len(shares) > 1 else 1.0,
        busiest=max(shares),
        dead=sum(not share for share in shares),
        balance_loss=balance / passes if passes else None,
    )
