"""A model that computes shapes instead of values, so that its arithmetic can be counted without doing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .control import smoe_layers
from .layer import SMoE


@contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """Within the block, all parameters and buffers are meta tensors of the same shapes, tied where they were tied."""
    twins: dict[int, Tensor] = {}
    before = []
    try:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                before.append((store, dict(store)))
                for name, tensor in store.items():
                    if tensor is not None:
                        store[name] = twins.setdefault(id(tensor), _meta_twin(tensor))
        yield
    finally:
        for store, tensors in before:
            store.clear()
            store.update(tensors)


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Within the block, SMoE layers compute k rows per token with plain matrix products, and meaningless values.

    The fast paths gather rows by their values, which meta tensors lack, and hide products in operators of their own.
    """
    layers = [layer for _, layer in smoe_layers(model)]
    routers = [layer.router for layer in layers if hasattr(layer.router, "logits")]
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer)
        for router in routers:  # the real one switches autocast off, which does not know the meta device
            router.logits = partial(_logits, router)
        yield
    finally:
        for module, name in [(layer, "forward") for layer in layers] + [(router, "logits") for router in routers]:
            vars(module).pop(name, None)


def _meta_twin(tensor: Tensor) -> Tensor:
    twin = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _forward(layer: SMoE, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
    flat = x.reshape(-1, layer.d_model)
    routing = layer.router(flat, token_ids)
    num_tokens, k = routing.indices.shape
    trained = any(p.requires_grad for p in layer.experts.parameters())
    # One expert's matrices for the rows of all of them: as many products, whatever the experts' layout in memory.
    shape = (layer.d_hidden // layer.num_experts, layer.d_model)
    up, down, gate = (torch.zeros(shape, dtype=x.dtype, device=x.device, requires_grad=trained) for _ in range(3))
    rows = flat.unsqueeze(1).expand(-1, k, -1).reshape(num_tokens * k, layer.d_model)
    hidden = rows @ up.t()
    if layer.experts.gated:
        hidden = hidden * (rows @ gate.t())
    out = (hidden @ down).view(num_tokens, k, layer.d_model)
    return (out * routing.weights.unsqueeze(-1)).sum(1).to(x.dtype).view(x.shape)


def _logits(router: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x.float(), router.weight.float(), router.bias.float())
