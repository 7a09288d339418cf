"""The k of every layer for a budget of FLOPs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .control import activated, smoe_layers
from .evaluating import evaluating


@torch.no_grad()
def fit_budget(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    flops: float,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> list[int]:
    """The k of every SMoE layer, in the model's order, with the least loss that ``flops`` can pay for.

    Starts from the largest k that all layers can have, and lets layers trade experts with one another as long as that
    lowers the loss. On ``batches`` the result is never worse than that one k; whether it is better on other data, data
    apart from ``batches`` tells. ``model`` stays as it is: ``smoe.set_top_k(model, ks)`` sets the result.

    Every round takes about two passes over ``batches`` per SMoE layer: a few thousand tokens should do.

    Args:
        model: its FLOPs are counted from shapes (see ``smoe.flops.count``).
        batches: validation data, as ``model`` is called with it: mappings (``model(**batch)``), tuples or lists
            (``model(*batch)``), or anything else (``model(batch)``), on the model's device. All count alike.
        flops: the most that one pass over the first batch may cost, as ``smoe.flops.count(model, batch, k).true``
            counts it.
        loss: of the output of a pass and its batch, a scalar. None takes ``output.loss``, which models of Transformers
            compute where a batch has labels.

    Raises:
        ValueError: the model has no SMoE layer, batches is empty, an output has no loss, or flops is less than one
            expert per layer costs.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model would be compiled for every k
    sizes = [layer.num_experts for _, layer in smoe_layers(model)]
    if not sizes:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is no k to choose")
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; at least one batch must be measured")
    losses: dict[tuple[int, ...], float] = {}

    def measure(ks: Sequence[int]) -> float:
        key = tuple(ks)
        if key not in losses:
            losses[key] = _mean_loss(model, batches, list(ks), loss)
        return losses[key]

    with evaluating(model):
        costs = _Costs(model, batches[0], sizes)
        if not costs.least <= flops:
            raise ValueError(f"flops is {flops}; a pass with one expert per layer costs {costs.least}")
        uniform = ([min(k, size) for size in sizes] for k in range(max(sizes), 0, -1))
        ks = next(ks for ks in uniform if costs.of(ks) <= flops)
        step = max(max(sizes) // 8, 1)
        while step:
            ks = _trade(ks, sizes, step, lambda ks: costs.of(ks) <= flops, measure)
            step //= 2
    return ks


class _Costs:
    """FLOPs of a pass over ``batch``: the ``least``, with one expert per layer, and those of one more in each layer."""

    def __init__(self, model: nn.Module, batch: Any, sizes: Sequence[int]) -> None:
        from .flops import count  # not at the top: `import smoe` would import it

        ones = [1] * len(sizes)
        self.least, self.expert = count(model, batch, ones).true, []
        for i, size in enumerate(sizes):
            all_of_one = count(model, batch, [*ones[:i], size, *ones[i + 1 :]]).true
            self.expert.append((all_of_one - self.least) // max(size - 1, 1))

    def of(self, ks: Sequence[int]) -> int:
        return self.least + sum((k - 1) * cost for k, cost in zip(ks, self.expert, strict=True))


def _trade(
    ks: list[int],
    sizes: Sequence[int],
    step: int,
    fits: Callable[[Sequence[int]], bool],
    measure: Callable[[Sequence[int]], float],
) -> list[int]:
    """Moves ``step`` experts at a time, from one layer to another or in one layer alone, while the loss goes down.

    How much a move gains is guessed from its two halves, each measured by itself; the move itself is measured last.
    """
    while True:
        now = measure(ks)
        gains = {}
        for i, by in itertools.product(range(len(ks)), (step, -step)):
            if 1 <= ks[i] + by <= sizes[i]:
                gains[i, by] = now - measure(_moved(ks, (i, by)))
        more, fewer = ([change for change in gains if change[1] == by] for by in (step, -step))
        moves = [(change,) for change in gains]
        moves += [(up, down) for up, down in itertools.product(more, fewer) if up[0] != down[0]]
        promising = {move: sum(gains[change] for change in move) for move in moves if fits(_moved(ks, *move))}
        promising = sorted((move for move in promising if promising[move] > 0), key=promising.get, reverse=True)
        better = (moved for move in promising[: len(ks)] if measure(moved := _moved(ks, *move)) < now)
        moved = next(better, None)
        if moved is None:
            return ks
        ks = moved


def _moved(ks: Sequence[int], *changes: tuple[int, int]) -> list[int]:
    """ks after every change (layer, by)."""
    moved = list(ks)
    for i, by in changes:
        moved[i] += by
    return moved


def _mean_loss(
    model: nn.Module, batches: Sequence[Any], ks: list[int], loss: Callable[[Any, Any], Tensor] | None
) -> float:
    from .flops import as_call

    total = 0.0
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with activated(model, ks), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # the same draws of a router that draws (THOR) for every ks
        for batch in batches:
            args, kwargs = as_call(batch)
            output = model(*args, **kwargs)
            value = getattr(output, "loss", None) if loss is None else loss(output, batch)
            if value is None:
                raise ValueError(f"{type(output).__name__} has no loss; give batches with labels, or loss=...")
            total += float(value)
    return total / len(batches)
