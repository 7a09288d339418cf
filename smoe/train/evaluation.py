"""A split measured with k activated experts, in the middle of a training or after it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from smoe.control import activated
from smoe.train.processes import Processes
from smoe.train.task import Task


class Measured(NamedTuple):
    """``values``: by metric. ``n``: the number of tokens or examples they are means of."""

    values: dict[str, float]
    n: int


@torch.no_grad()
def measure(task: Task, split: str, k: int | None, processes: Processes) -> Measured:
    """Measures ``split`` with k activated experts (None: each layer's own, or a dense model); every process calls it.

    Afterwards the model is back in its mode and at its own k, and PyTorch's generators are where they were.
    """
    model, device = task.model, processes.device
    was_training = model.training
    model.eval()
    try:
        with (
            activated(model, k),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=task.config.precision == "bf16"),
        ):
            torch.manual_seed(processes.rank)  # of what a router draws at random (THOR)
            sums = sum(task.passes(model, split, device))
    finally:
        model.train(was_training)
    assert isinstance(sums, torch.Tensor), f"{split}: no pass"
    total = processes.sum(sums).tolist()
    return Measured(task.values(total), round(total[-1]))


def k_name(k: int | None) -> str:
    """The key of a k in records: the number, or ``dense``."""
    return "dense" if k is None else str(k)


def sweep(task: Task, processes: Processes) -> dict[str, dict[str, Measured]]:
    """Every split of the task at every k of the configuration's sweep: split -> k -> what was measured."""
    measured: dict[str, dict[str, Measured]] = {split: {} for split in task.splits}
    for k in task.config.sweep_ks():
        for split in task.splits:
            measured[split][k_name(k)] = measure(task, split, k, processes)
        if processes.is_main:
            decides = task.metrics[0]
            values = (f"{split} {by_k[k_name(k)].values[decides.key]:.4f}" for split, by_k in measured.items())
            print(f"{'dense' if k is None else f'k = {k:2}'}: {decides.title} {', '.join(values)}", flush=True)
    return measured
