"""A whole SMoE layer for few tokens without gradients, routing and experts, in as few steps as it takes.

At one token the checks and small tensors between the parts of a layer take as long as its products. This way leaves
them out, where nothing needs them: no watcher, hook or wrapper, plain float32 tensors on a CPU. It keeps nothing from
pass to pass, so a changed k, weight or dtype counts at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .compute import few
from .compute.fast_path import Parameters
from .experts import Experts
from .router import LearnedRouter, RandomRouter


def forward(x: Tensor, router: nn.Module, experts: nn.Module, scale: float) -> Tensor | None:
    """What a layer of this router and these experts makes of x (..., d), times ``scale``; None if not possible."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return None
    if x.dtype is not torch.float32 or _is_watched() or not (_is_bare(router) and _is_bare(experts)):
        return None
    own = experts._parameters  # as attributes they take ten times as long
    parameters = Parameters(*map(own.get, Parameters._fields))
    for p in (router.weight, *parameters):
        if p is not None and (p.dtype is not torch.float32 or type(p) not in (nn.Parameter, Tensor) or not p.is_cpu):
            return None
    flat = x.reshape(-1, experts.d_model)
    if not few.pays(flat.shape[0], router.top_k, experts):
        return None
    indices, weights = router.choice(flat)
    if weights is not None and scale != 1:
        weights = weights * scale
    if indices is None:
        y = few.all_experts(flat, experts, parameters, weights)
    else:
        y = few.chosen_experts(flat, experts, parameters, weights, indices)
    if weights is None and scale != 1:
        y *= scale
    return y.view(x.shape)


def _is_watched() -> bool:
    """Whether something records or transforms what PyTorch computes here."""
    return (
        torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or nn.modules.module._has_any_global_hook()
    )


def _is_bare(module: nn.Module) -> bool:
    """Whether this is a part of a layer as smoe makes it, whose call does nothing but ``forward``."""
    state = vars(module)
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
        return False
    if type(module) is Experts:
        return not module.drops
    return type(module) in (RandomRouter, LearnedRouter) and not module._watchers
