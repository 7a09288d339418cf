"""Gradients of spread experts: what DDP does for all other parameters, and clipping by the norm of the whole model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fsdp import is_sharded
from .groups import ParallelGroups, communication_device
from .shard import check_ddp, expert_parameters, spread_layers

# Bytes of gradients that are reduced as one message.
BUCKET_BYTES = 64 << 20


@torch.no_grad()
def sync_expert_gradients(model: nn.Module, groups: ParallelGroups) -> None:
    """Makes the experts' gradients those of the mean loss over all W ranks, as DDP makes the others'.

    After ``backward`` an expert's gradient is the sum over the tokens of all ranks of its group. This sums it over the
    ranks that hold the same experts, and divides by W. Call it once a step on every rank, after the last ``backward``
    and before clipping and the optimizer:

    - accumulating gradients over several passes, after the last of them (DDP's ``no_sync`` has no meaning for
      experts: nothing is reduced before this call);
    - with several passes in one ``backward`` (THOR), after it, once.

    A second call without a ``backward`` in between does nothing. With a gradient scaler, unscale before or after.
    """
    layers = spread_layers(model)
    if not any(layer.dispatch.unsynced for _, layer in layers):
        return
    check_ddp(model)
    for _, layer in layers:
        layer.dispatch.unsynced = False
    gradients, averaged = [], []
    for parameter in expert_parameters(model):
        if not parameter.requires_grad:
            continue
        if is_sharded(parameter):
            if parameter.grad is not None:
                averaged.append(parameter.grad.to_local())
            continue
        # A rank may lack a gradient that others have (a layer it did not run); all must reduce the same tensors.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if averaged:  # FSDP has averaged over the ranks with the same experts
        torch._foreach_mul_(averaged, 1 / groups.expert_parallel)
    if groups.edp_group is None:
        if gradients:
            torch._foreach_mul_(gradients, 1 / groups.world_size)
        return
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).mul_(1 / groups.world_size)
        dist.all_reduce(flat, group=groups.edp_group)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """The gradients in groups of one dtype and at most ``BUCKET_BYTES`` (or one tensor)."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for gradient in sorted(gradients, key=lambda g: str(g.dtype)):
        size = gradient.numel() * gradient.element_size()
        if not buckets or filled + size > BUCKET_BYTES or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(gradient)
        filled += size
    return buckets


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, groups: ParallelGroups) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with the 2-norm of the whole model: all experts once, everything else once.

    Every rank calls it, and gets the same norm, that before clipping (a scalar). ``sync_expert_gradients`` is called if
    it has not been since the last ``backward``; with a gradient scaler, unscale first.
    """
    sync_expert_gradients(model, groups)
    experts = {id(parameter) for parameter in expert_parameters(model)}
    equal, of_group, of_rank = [], [], []  # the same on every rank; one's own in the group; one's own among all
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if is_sharded(parameter.grad):
            of_rank.append(parameter.grad.to_local())
        else:
            (of_group if id(parameter) in experts else equal).append(parameter.grad)
    square = torch.nn.utils.get_total_norm(equal).square()
    for gradients, group in ((of_group, groups.ep_group), (of_rank, None)):
        if gradients:
            part = torch.nn.utils.get_total_norm(gradients).square().to(communication_device(gradients[0]))
            dist.all_reduce(part, group=group)
            square = square.to(part.device) + part
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    gradients = [*equal, *of_group, *of_rank]
    for device in {gradient.device for gradient in gradients}:
        torch._foreach_mul_([g for g in gradients if g.device == device], factor.to(device))
    return norm


def attach(accelerator: Any, model: nn.Module, groups: ParallelGroups) -> None:
    """Makes an ``accelerate.Accelerator`` clip by :func:`clip_grad_norm_`, and so sync the experts' gradients.

    The whole integration with accelerate::

        model = parallelize(model, groups)              # before prepare
        model, optimizer = accelerator.prepare(model, optimizer)
        attach(accelerator, model, groups)
        ...
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), max_norm)    # max_norm = inf: sync alone

    ``transformers.Trainer`` calls ``clip_grad_norm_`` once a step: parallelize the model before the Trainer is made,
    and call ``attach(trainer.accelerator, model, groups)`` before ``train()``. An optimizer that steps without it would
    use unsynced gradients; see :func:`sync_before_step` for a loop that never clips. Checkpoints that they write
    themselves hold one rank's slices: with Trainer, ``save_strategy="no"``, and write what ``gather_state`` returns.
    """

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        if norm_type != 2:
            raise ValueError(f"norm_type is {norm_type}; with spread experts it must be 2")
        accelerator.unscale_gradients()
        return clip_grad_norm_(model, max_norm, groups)

    accelerator.clip_grad_norm_ = clip


def sync_before_step(optimizer: torch.optim.Optimizer, model: nn.Module, groups: ParallelGroups) -> None:
    """Has ``optimizer`` call :func:`sync_expert_gradients` before every step, for loops that cannot call it."""
    optimizer.register_step_pre_hook(lambda *_: sync_expert_gradients(model, groups))
