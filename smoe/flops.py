"""What a model costs: FLOPs of a pass, parameters, bytes; from shapes alone, without running or allocating anything.

Two counts of FLOPs, both 2 x multiply-adds:

paper   linear layers only, as Table 1 counts them: no attention scores or values, no activations. An SMoE layer has
        its router (d x N, whichever router it is) and k of its N experts.
true    everything that PyTorch's own counter knows: all matrix products, attention included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from .control import activated, check_whole, smoe_layers
from .layer import SMoE
from .methods import Method, get_method
from .shapes import on_meta, plain_experts

TopK = int | Sequence[int] | None  # one k for all SMoE layers, one per layer, or each layer's own


@dataclass(frozen=True)
class FlopCount:
    """The cost of one forward pass and the size of the model that makes it.

    paper_linear, true: FLOPs by the two counts of this module.
    params_total: all parameters, tied ones once; a fixed router's weights are buffers, not parameters.
    params_active: those that one token uses: without the share (N - k) / N of each SMoE layer's experts.
    weight_bytes: of what a checkpoint holds, all parameters and saved buffers in their present dtypes.
    """

    paper_linear: int
    true: int
    params_total: int
    params_active: int
    weight_bytes: int


def count(model: nn.Module, example_inputs: Any, k: TopK = None, *, meta: bool = True) -> FlopCount:
    """Count one forward pass of any model, with or without SMoE layers.

    The model is left as it was. SMoE layers count the same whichever path computes them: k rows per token.

    Args:
        model: on any device, ``meta`` too.
        example_inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments; shapes alone matter.
        k: activated experts: one number for every SMoE layer, or one per layer; None leaves each layer's own.
        meta: count on tensors that have shapes and no data. False runs the pass on the model's own device, for models
            whose forward looks at values.

    Raises:
        ValueError: k does not fit, or the model can't be counted on shapes alone.
    """
    args, kwargs = as_call(example_inputs)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    with _prepared(model, k, meta), torch.no_grad(), _linear_flops(model) as linear:
        true = _true_flops(lambda: model(*_to_meta(args, meta), **_to_meta(kwargs, meta)), type(model).__name__)
        return FlopCount(sum(linear), true, *_sizes(model))


def count_step(
    model: nn.Module,
    method: str | Method,
    example_inputs: Any,
    k: TopK = None,
    *,
    consistency_weight: float | None = None,
    balance_weight: float | None = None,
) -> int:
    """FLOPs of a training step by the true count: every forward pass of the method's loss, and the backward pass.

    THOR's two passes are both counted. The optimizer's arithmetic, which is no matrix product, is not.

    Args:
        model: its output must have ``loss`` and ``logits`` (see ``smoe.methods.PassOutput``).
        example_inputs, k: as in :func:`count`, targets among the inputs.
        consistency_weight, balance_weight: as the training gives them to ``Method.loss``; None: the method's own.
    """
    method = get_method(method) if isinstance(method, str) else method
    model = getattr(model, "_orig_mod", model)
    args, kwargs = as_call(example_inputs)
    weights = {"consistency_weight": consistency_weight, "balance_weight": balance_weight}

    def step() -> None:
        method.loss(model, lambda: model(*_to_meta(args), **_to_meta(kwargs)), **weights).total.backward()

    with _prepared(model, k, meta=True), torch.enable_grad():
        return _true_flops(step, type(model).__name__)


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """params_total, params_active and weight_bytes at the layers' present k."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for _, layer in smoe_layers(model):
        experts = sum(p.numel() for p in layer.experts.parameters())
        idle += experts * (layer.num_experts - layer.top_k) // layer.num_experts
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return total, total - idle, sum(t.numel() * t.element_size() for t in saved.values())


def as_call(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """The arguments and keyword arguments that a model is called with: a mapping, a tuple or list, or one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _to_meta(inputs: Any, meta: bool = True) -> Any:
    return tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), inputs) if meta else inputs


@contextmanager
def _prepared(model: nn.Module, k: TopK, meta: bool) -> Iterator[None]:
    check_whole(model, "count")
    with ExitStack() as stack:
        stack.enter_context(activated(model, k))
        if any(layer.k_per_row is not None for _, layer in smoe_layers(model)):
            raise ValueError("k is a tensor, one per row; count the rows of each k by themselves")
        stack.enter_context(plain_experts(model))
        if meta:
            stack.enter_context(on_meta(model))
        else:  # the counter has no formula for the CPU's fused attention; the products are the same
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # a compiled model would be compiled anew, for meta tensors
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _true_flops(run: Callable[[], Any], name: str) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter:
            run()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} can't be counted from shapes alone, its forward needs data ({reason}); use count(..., meta=False)"
        ) from error
    return counter.get_total_flops()


@contextmanager
def _linear_flops(model: nn.Module) -> Iterator[list[int]]:
    """Within the block, collects the FLOPs by the paper's count of every linear and SMoE layer that runs."""
    flops: list[int] = []
    inside = {id(m) for _, layer in smoe_layers(model) for m in layer.modules() if m is not layer}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, SMoE):
            matrices = 3 if module.experts.gated else 2
            d_expert = module.d_hidden // module.num_experts
            per_token = module.d_model * (module.num_experts + module.top_k * matrices * d_expert)
            flops.append(2 * (output.numel() // module.d_model) * per_token)
        elif isinstance(module, nn.MultiheadAttention):
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            sizes = [named[name].numel() for name in ("query", "query", "key", "value")]  # twice: the output's as well
            flops.append(2 * module.embed_dim * sum(sizes))
        else:
            fan_in = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            flops.append(2 * output.numel() * fan_in)

    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in model.modules()
        if id(module) not in inside
        # Conv1D: Hugging Face's linear layer of GPT-2, its weight transposed.
        and (isinstance(module, (SMoE, nn.Linear, nn.MultiheadAttention)) or type(module).__name__ == "Conv1D")
    ]
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()
