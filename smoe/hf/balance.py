"""The load-balancing loss of learned routers in a ``Trainer``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..control import record_routing, smoe_layers
from ..layer import SMoE
from ..padding import Mask, mask_key, real_tokens
from ..router import LearnedRouter, balance_loss


class BalanceLoss:
    """Adds ``balance_weight`` times the load-balancing losses of all layers to what a ``Trainer`` minimises.

    Put it before the class of any trainer::

        class BalancedTrainer(smoe.hf.BalanceLoss, Trainer): ...

        trainer = BalancedTrainer(model, args, balance_weight=0.01, ...)

    The loss is the sum over the layers (``smoe.balance_loss`` of each, without padding), and the mean over the batches
    of an accumulated step and over the ranks, whatever the task's own loss is divided by. The training loss that is
    logged has it in it; evaluations don't.

    Args:
        balance_weight: 0.01 in Fedus et al. 2021.
        balance_mask: which entry of a batch tells tokens from padding, as ``mask`` of ``smoe.vote``.

    Raises:
        ValueError: no router of the model is learned, the weight is negative, several GPUs share this process
            (``torch.nn.DataParallel``), or ``use_reentrant`` checkpointing hides the routers from autograd.
    """

    def __init__(self, *args: Any, balance_weight: float = 0.01, balance_mask: Mask = None, **kwargs: Any) -> None:
        if isinstance(balance_weight, bool) or not isinstance(balance_weight, (int, float)) or not balance_weight >= 0:
            raise ValueError(f"balance_weight is {balance_weight!r}; it must be a number of at least 0")
        super().__init__(*args, **kwargs)
        self.balance_weight, self.balance_mask = balance_weight, balance_mask
        if not _learned(self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no learned router, and others have no balance loss; leave out "
                'BalanceLoss, or smoe.modulize(model, router="learned")'
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs share one process; start one per GPU with torchrun")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # the original's labels may be taken out
        layers = _learned(self.model)  # whatever is around it
        with ExitStack() as stack:
            passes = {name: stack.enter_context(record_routing(layer)) for name, layer in layers.items()}
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        masks = {
            name: real_tokens(batch, mask_key(name, self.balance_mask, self.model), self.balance_mask is not None)
            for name in layers
        }
        losses = [balance_loss(routing, masks[name]) for name, routings in passes.items() for routing in routings]
        balance = torch.stack([each.to(loss.device) for each in losses]).sum()
        trained = any(p.requires_grad for layer in layers.values() for r in layer.routers for p in r.parameters())
        if trained and not balance.requires_grad:
            raise ValueError(
                "the balance loss has no gradient under reentrant checkpointing; use_reentrant must be False in the "
                "keyword arguments of the trainer's checkpointing"
            )
        if self._is_divided(num_items_in_batch):
            # By the number of tokens of the whole step; the caller adds such losses up over its batches.
            balance = balance / self.current_gradient_accumulation_steps
        loss = loss + self.balance_weight * balance
        return (loss, outputs) if return_outputs else loss

    def _is_divided(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether ``training_step`` won't divide what ``compute_loss`` returns by the number of accumulated batches."""
        given = getattr(self, "loss_is_scaled_for_ga", None)
        if given is not None:
            return given
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None


def _learned(model: nn.Module) -> dict[str, SMoE]:
    """The layers whose router is learned, by name; of layers that share one, the first."""
    layers: dict[str, SMoE] = {}
    seen: set[int] = set()
    for name, layer in smoe_layers(model):
        router = layer.routers[0]
        if isinstance(router, LearnedRouter) and id(router) not in seen:
            seen.add(id(router))
            layers[name] = layer
    return layers
