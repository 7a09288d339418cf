"""Gradients of expert-parallel experts: averaging, as DDP does for all other parameters, and clipping."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fsdp import is_sharded
from .groups import ParallelGroups, communication_device
from .shard import check_ddp, expert_parameters, parallelized_layers

# Bytes of gradients that are reduced in one message.
BUCKET_BYTES = 64 << 20


@torch.no_grad()
def sync_expert_gradients(model: nn.Module, groups: ParallelGroups) -> None:
    """Makes the experts' gradients those of the mean loss over all W ranks, as DDP does for other parameters.

    After ``backward`` an expert's gradient is the sum over the tokens of its expert-parallel group. This adds up the
    gradients of the ranks that hold the same experts, and divides by W. Call it on every rank, once per step, after
    the last ``backward`` and before clipping and the optimizer:

    - with gradient accumulation, after the last pass (DDP's ``no_sync`` does not concern the experts, whose gradients
      are only reduced here);
    - with several passes in one ``backward`` (THOR), once after it.

    A second call without a ``backward`` in between does nothing. A gradient scaler may unscale before or after it.

    Raises:
        ValueError: a DDP in ``model`` averages the experts too.
    """
    layers = parallelized_layers(model)
    check_ddp(model)
    if not any(layer.dispatch.unsynced for _, layer in layers):
        return
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
        # A rank may lack a gradient that others have (a layer that it did not run); all must reduce the same tensors.
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
    """The gradients in lists of one dtype and at most ``BUCKET_BYTES`` (or one tensor)."""
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
    """``torch.nn.utils.clip_grad_norm_`` by the 2-norm of the whole model, in which every expert counts once.

    Every rank calls it and gets the same norm, a scalar, from before clipping. It calls ``sync_expert_gradients`` if
    that has not run since the last ``backward``. With a gradient scaler, unscale first.
    """
    sync_expert_gradients(model, groups)
    experts = {id(parameter) for parameter in expert_parameters(model)}
    # Gradients that are the same on all ranks; that differ within an expert-parallel group; that differ on all ranks.
    equal, of_group, of_rank = [], [], []
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
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as in torch.nn.utils.clip_grad_norm_
    gradients = [*equal, *of_group, *of_rank]
    for device in {gradient.device for gradient in gradients}:
        torch._foreach_mul_([g for g in gradients if g.device == device], factor.to(device))
    return norm


def attach(accelerator: Any, model: nn.Module, groups: ParallelGroups) -> None:
    """Makes an ``accelerate.Accelerator`` clip with :func:`clip_grad_norm_`, which also syncs the experts' gradients.

    With accelerate::

        model = parallelize(model, groups)              # before prepare
        model, optimizer = accelerator.prepare(model, optimizer)
        attach(accelerator, model, groups)
        ...
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), max_norm)    # max_norm = inf: only sync

    ``transformers.Trainer`` calls ``clip_grad_norm_`` once per step: parallelize the model before you make the
    Trainer, and call ``attach(trainer.accelerator, model, groups)`` before ``train()``. A loop that never clips needs
    :func:`sync_before_step`, or its optimizer steps with unsynced gradients. The checkpoints that Trainer and
    accelerate write hold one rank's shards: use ``save_strategy="no"``, and save what ``gather_state`` returns.
    """

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        if norm_type != 2:
            raise ValueError(f"norm_type is {norm_type}; with expert parallelism it must be 2")
        accelerator.unscale_gradients()
        return clip_grad_norm_(model, max_norm, groups)

    accelerator.clip_grad_norm_ = clip


def sync_before_step(optimizer: torch.optim.Optimizer, model: nn.Module, groups: ParallelGroups) -> None:
    """Makes ``optimizer`` call :func:`sync_expert_gradients` before every step, for loops that cannot call it."""
    optimizer.register_step_pre_hook(lambda *_: sync_expert_gradients(model, groups))
