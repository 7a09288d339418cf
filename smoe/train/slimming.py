"""The experts of a run that have the highest votes on the training data of a task, and the run without the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smoe.control import activated
from smoe.methods import get_method
from smoe.modulize.layers import chosen_layers
from smoe.slim import Votes, VoteScore, slim, vote
from smoe.train.task import Task


def slimmed_fields(recorded: Mapping[str, Any], keep: int, run: object) -> dict[str, Any]:
    """What changes in the configuration of a run once every layer has ``keep`` of its N experts; nothing if all stay.

    Its ``num_experts`` and ``d_hidden`` are those of what is left, so that it builds the right model, and the output
    scale stays the number that it was in training (see :func:`smoe.slim`). No k is above ``keep``.

    Args:
        recorded: the configuration as plain data. run: for messages, the run folder.

    Raises ValueError when the run has no experts, or not in all layers, or keep is not in 1..N.
    """
    for name in ("method", "num_experts", "layers", "num_layers", "d_hidden", "output_scale", "sweep"):
        if name not in recorded:
            raise ValueError(f"run: the configuration of {run} lacks {name}; it must be of a run of this version")
    if not get_method(recorded["method"]).routed:
        raise ValueError(f"keep is {keep}, but {recorded['method']}, the method of {run}, has no experts")
    experts, layers = recorded["num_experts"], recorded["layers"]
    if not 1 <= keep <= experts:
        raise ValueError(f"keep is {keep}; it must be from 1 to {experts}, the experts of {run}")
    if len(chosen_layers(layers, recorded["num_layers"])) < recorded["num_layers"]:
        raise ValueError(
            f"layers is {layers!r} in {run}, and its other layers have dense MLPs of the same d_hidden; a run can be "
            "slimmed if all of its layers have experts (smoe.slim works with any model)"
        )
    if keep == experts:
        return {}
    changed: dict[str, Any] = {"num_experts": keep, "d_hidden": recorded["d_hidden"] // experts * keep}
    if recorded["output_scale"] == "num_experts":
        changed["output_scale"] = float(experts)
    changed |= {name: min(recorded[name], keep) for name in ("k_min", "k_max") if recorded.get(name) is not None}
    return changed | {"sweep": sweep_up_to(keep, recorded["sweep"])}


def sweep_up_to(keep: int, ks: Iterable[int]) -> tuple[int, ...]:
    """The k of a final sweep that a model of ``keep`` experts can activate, all of them among these."""
    return tuple(sorted({k for k in ks if k < keep} | {keep}))


class _Reader(nn.Module):
    """Reads batches of a task, as :func:`smoe.vote` calls a model."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__()
        self.model = task.model
        self._task, self._device = task, device

    def forward(self, batch: Any, attention_mask: Tensor | None) -> None:
        self._task.carry(self._task.forward(self.model, batch, self._device))


def slim_task(
    task: Task,
    keep: int,
    *,
    batches: int,
    device: torch.device,
    token_mask: Callable[[Any], Tensor] | None = None,
    k: int | None = None,
    score: VoteScore = "count",
) -> Votes:
    """Keeps the ``keep`` experts per layer of ``task.model`` that have the highest votes; returns the votes.

    The first ``batches`` training batches vote, in float32. Where all experts stay there is no vote.

    Args:
        device: where the model is.
        token_mask: of a batch, nonzero where there is a token that an SMoE layer sees, 0 at padding; None: no padding.
        k: activated experts while the batches vote; None: ``keep``.
        score: see :func:`smoe.vote`.
    """
    if keep == task.config.num_experts:
        return {}
    reader = _Reader(task, device)
    read = map(task.batch, range(batches))
    named = ({"batch": batch, "attention_mask": token_mask and token_mask(batch)} for batch in read)
    with activated(task.model, keep if k is None else k):
        votes = vote(reader, named, score=score)
    slim(reader, votes, keep)
    return {name.removeprefix("model."): scores for name, scores in votes.items()}
