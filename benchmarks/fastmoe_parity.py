"""How far SMoE on fastmoe's FMoE is from SMoE on PyTorch alone: outputs, all gradients, weights after training steps.

    python -m benchmarks.fastmoe_parity [--processes 1 2] [--device cpu] [--json OUT]

Both layers start from the same state dict and take the same steps of SGD, each with its own gradients, while k changes
from step to step. Needs fmoe: with its CUDA extension and --device cuda, or on a CPU with an fmoe_cuda written in
Python. What is printed are the largest differences; the record says what they were measured with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoe import SMoE, record_routing
from smoe.router import ROUTERS, SCORES

D, H, N, V, TOKENS = 16, 64, 8, 50, 40
KS = (1, 2, N // 2, N, 2)  # and back: k may go down as well
KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gelu, no bias": {"activation": "gelu", "bias": False},
    "silu, gated": {"activation": "silu", "gated": True},
    "relu, output_scale k": {"output_scale": "k"},
}


def cases() -> list[dict[str, Any]]:
    """Options of SMoE: every router with every score, and every kind of expert."""
    routed = [{"router": router, "score": score} for router in ROUTERS for score in SCORES]
    return routed + [{"router": "learned", **kind} for kind in KINDS.values() if kind]


def make_layer(engine: str, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> SMoE:
    """A layer with router weights so large that every score rule shows."""
    layer = SMoE(D, H, N, engine=engine, vocab_size=V, seed=1, **options)
    if options.get("router") in ("random", "learned"):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            layer.router.weight.mul_(50)
            layer.router.bias.copy_(torch.randn(N, generator=generator))
    return layer.to(device, dtype)


def compare(options: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The largest differences |a - b| / (1 + |b|) between the engines over one step at each k of ``KS``, by what differs.

    Raises:
        AssertionError: the engines routed a token differently.
    """
    torch.manual_seed(0)
    fast, plain = (make_layer(engine, device, dtype, **options) for engine in ("fastmoe", "torch"))
    plain.load_state_dict(fast.state_dict())
    worst = {"output": 0.0, "gradient of x": 0.0, "gradients of parameters": 0.0, "weights": 0.0}

    def note(what: str, a: Tensor, b: Tensor) -> None:
        worst[what] = max(worst[what], ((a - b).abs() / (1 + b.abs())).max().item())

    for step, k in enumerate(KS):
        x = torch.randn(2, TOKENS // 2, D).to(device, dtype)
        ids, direction = torch.randint(V, x.shape[:2]).to(device), torch.randn(x.shape).to(device, dtype)
        passes = [_pass(layer, k, x, ids, direction, step) for layer in (fast, plain)]
        (routed, y, grad_x), (routed_plain, y_plain, grad_x_plain) = passes
        assert torch.equal(routed, routed_plain), f"{options}: routed differently at k = {k}"
        note("output", y, y_plain)
        note("gradient of x", grad_x, grad_x_plain)
        for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
            note("gradients of parameters", a.grad, b.grad)
        for layer in (fast, plain):
            torch.optim.SGD(layer.parameters(), lr=0.01).step()
    for name, value in fast.state_dict().items():
        note("weights", value.to(dtype), plain.state_dict()[name].to(dtype))
    # And back: what was trained on fmoe is the same layer on PyTorch.
    plain.load_state_dict(fast.state_dict())
    note("output", *(_pass(layer, N // 2, x, ids, direction, 0)[1] for layer in (fast, plain)))
    return worst


def _pass(layer: SMoE, k: int, x: Tensor, ids: Tensor, direction: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, output and gradient of x of one forward and backward pass; the parameters keep their gradients."""
    torch.manual_seed(seed)  # the uniform router draws
    layer.top_k = k
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with record_routing(layer) as routings:
        y = layer(leaf, token_ids=ids)
    (routing,) = routings
    loss = (y * direction).sum()
    (loss if routing.balance_loss is None else loss + routing.balance_loss).backward()
    return routing.indices, y.detach(), leaf.grad
