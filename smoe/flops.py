"""What a model costs: FLOPs of a pass, parameters, bytes; from shapes alone, without running or allocating anything.

Two counts of FLOPs, both 2 x multiply-adds:

paper   linear layers only, as Table 1 counts them: no attention scores or values, no activations. An SMoE layer has
        its router (d x N, whichever router it is) and k of its N experts.
true    everything that PyTorch's own counter knows: all matrix products, attention included.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from .control import check_whole, set_top_k, smoe_layers
from .layer import SMoE
from .methods import Method, get_method
from .paper import check_k, linear_flops, mlp_macs, paper_flops, sizes_of, smoe_macs, table1

__all__ = [
    "FlopCount",
    "count",
    "count_step",
    "masked_lm",
    "paper_flops",
    "table1",
    "transformer_xl_flops",
    "transformer_xl_step_flops",
]


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


def count(model: nn.Module, example_inputs: Any, k: int | None = None, *, meta: bool = True) -> FlopCount:
    """Count one forward pass of any model, with or without SMoE layers.

    The model is left as it was. SMoE layers count the same whichever path computes them: k rows a token.

    Args:
        model: on any device, ``meta`` too.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments; shapes alone matter.
        k: experts activated in every SMoE layer; None leaves each layer's own.
        meta: count on tensors that have shapes and no data. False runs the pass on the model's own device, for models
            whose forward looks at values.

    Raises:
        ValueError: k does not fit, or the model can't be counted on shapes alone.
    """
    args, kwargs = _as_call(example_inputs)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    with _prepared(model, k, meta), torch.no_grad(), _linear_counter(model) as linear:
        true = _count_ops(lambda: model(*_to_meta(args, meta), **_to_meta(kwargs, meta)), type(model).__name__)
        return FlopCount(linear[0], true, *_sizes(model))


def count_step(model: nn.Module, method: str | Method, example_inputs: Any, k: int | None = None) -> int:
    """FLOPs of a training step by the true count: every forward pass of the method's loss, and the backward pass.

    THOR's two passes are both counted. The optimizer's arithmetic, which is no matrix product, is not.

    Args:
        model: its output must have ``loss`` and ``logits`` (see ``smoe.methods.PassOutput``).
        example_inputs, k: as in :func:`count`, targets among the inputs.
    """
    method = get_method(method) if isinstance(method, str) else method
    model = getattr(model, "_orig_mod", model)
    args, kwargs = _as_call(example_inputs)

    def step() -> None:
        method.loss(model, lambda: model(*_to_meta(args), **_to_meta(kwargs))).total.backward()

    with _prepared(model, k, meta=True), torch.enable_grad():
        return _count_ops(step, type(model).__name__)


def transformer_xl_flops(
    model: nn.Module, k: int | None = None, *, batch: int = 10, tgt_len: int = 128, mem_len: int = 896
) -> dict[str, int]:
    """The cost of one evaluation pass of a Transformer-XL: ``paper`` and ``true`` FLOPs and the sizes of FlopCount.

    Args:
        model: a ``TransformerXL``, on any device; on ``meta`` it need not even be allocated.
        batch, tgt_len, mem_len: sequences, tokens of each and remembered tokens; the defaults are Table 1's.
    """
    counted = dataclasses.asdict(count(model, _transformer_xl_inputs(model, batch, tgt_len, mem_len), k))
    del counted["paper_linear"]
    c = model.config
    shape = {"d_model": c.d_model, "num_heads": c.num_heads, "d_head": c.d_head}
    shape |= {"batch": batch, "tgt_len": tgt_len, "mem_len": mem_len}
    with _top_k(model, k):
        return {
            "paper": linear_flops("transformer_xl", [mlp_macs(layer.mlp) for layer in model.layers], shape),
            **counted,
        }


def transformer_xl_step_flops(
    model: nn.Module,
    method: str | Method,
    k: int | None = None,
    *,
    batch: int = 22,
    tgt_len: int = 512,
    mem_len: int = 512,
) -> int:
    """True FLOPs of a training step of a Transformer-XL (:func:`count_step`); the defaults are the paper's."""
    return count_step(model, method, _transformer_xl_inputs(model, batch, tgt_len, mem_len), k)


def masked_lm(
    arch: str, method: str = "dense_dropout", k: int | None = None, *, num_experts: int = 16, **sizes: int
) -> nn.Module:
    """Hugging Face's BERT or RoBERTa for masked-LM on the meta device, each layer's MLP that of ``method``.

    Args:
        arch: ``bert`` or ``roberta``. k: None means all experts. sizes: replace those of ``smoe.paper.SIZES[arch]``.
    """
    if arch not in ("bert", "roberta"):
        raise ValueError(f"arch is {arch!r}; a masked-LM is bert or roberta")
    s = sizes_of(arch, sizes)
    check_k(method, k, num_experts)
    import transformers

    name = {"bert": "Bert", "roberta": "Roberta"}[arch]
    model_class = getattr(transformers, f"{name}ForMaskedLM")
    extra = {"max_position_embeddings": 514, "type_vocab_size": 1} if arch == "roberta" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=s["vocab_size"],
        hidden_size=s["d_model"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_heads"],
        intermediate_size=s["d_hidden"],
        **extra,
    )
    options: dict[str, Any] = {"activation": "gelu"}
    if get_method(method).routed:
        options["top_k"] = num_experts if k is None else k
    with torch.device("meta"):
        model = model_class(config)
        for layer in model.base_model.encoder.layer:
            layer.intermediate = get_method(method).make_mlp(
                s["d_model"], s["d_hidden"], num_experts=num_experts, **options
            )
            layer.output.dense = nn.Identity()
    return model


def _transformer_xl_inputs(model: nn.Module, batch: int, tgt_len: int, mem_len: int) -> dict[str, Any]:
    for name, value, least in (("batch", batch, 1), ("tgt_len", tgt_len, 1), ("mem_len", mem_len, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    ids = torch.empty(batch, tgt_len, dtype=torch.int64, device="meta")
    shape = (len(model.layers), batch, mem_len, model.config.d_model)
    memory = torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta") if mem_len else None
    return {"input_ids": ids, "targets": ids, "memory": memory}


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """params_total, params_active and weight_bytes at the layers' present k."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for _, layer in smoe_layers(model):
        experts = sum(p.numel() for p in layer.experts.parameters())
        idle += experts * (layer.num_experts - layer.top_k) // layer.num_experts
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return total, total - idle, sum(t.numel() * t.element_size() for t in saved.values())


# ---- how a pass is counted


def _as_call(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _to_meta(inputs: Any, meta: bool = True) -> Any:
    return tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), inputs) if meta else inputs


def _count_ops(run: Any, name: str) -> int:
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
def _prepared(model: nn.Module, k: int | None, meta: bool) -> Iterator[None]:
    check_whole(model, "count")
    with ExitStack() as stack:
        stack.enter_context(_top_k(model, k))
        stack.enter_context(_plain_smoe(model))
        if meta:
            stack.enter_context(_on_meta(model))
        else:  # the counter has no formula for the CPU's fused attention; the products are the same
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # a compiled model would be compiled anew, for meta tensors
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _top_k(model: nn.Module, k: int | None) -> Iterator[None]:
    before = [(layer, layer.top_k) for _, layer in smoe_layers(model)]
    try:
        if k is not None:
            set_top_k(model, k)
        yield
    finally:
        for layer, top_k in before:
            layer.top_k = top_k


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
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


def _meta_twin(tensor: Tensor) -> Tensor:
    twin = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


@contextmanager
def _plain_smoe(model: nn.Module) -> Iterator[None]:
    """Within the block, SMoE layers compute k rows a token with plain matrix products, and garbage values.

    The fast paths gather rows by their values, which meta tensors lack, and hide products in operators of their own.
    """
    layers = [layer for _, layer in smoe_layers(model)]
    linear = [layer.router for layer in layers if hasattr(layer.router, "logits")]
    try:
        for layer in layers:
            layer.forward = partial(_plain_forward, layer)
        for router in linear:  # autocast, which the real one switches off, does not know the meta device
            router.logits = partial(_plain_logits, router)
        yield
    finally:
        for module, name in [(layer, "forward") for layer in layers] + [(router, "logits") for router in linear]:
            vars(module).pop(name, None)


def _plain_forward(layer: SMoE, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
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


def _plain_logits(router: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x.float(), router.weight.float(), router.bias.float())


@contextmanager
def _linear_counter(model: nn.Module) -> Iterator[list[int]]:
    """Within the block, adds up in element 0 the FLOPs of the linear and SMoE layers that run."""
    total = [0]
    inside = {id(m) for _, layer in smoe_layers(model) for m in layer.modules() if m is not layer}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, SMoE):
            total[0] += 2 * (output.numel() // module.d_model) * smoe_macs(module)
        elif isinstance(module, nn.MultiheadAttention):
            query, key, value = (
                args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value"))
            )
            total[0] += 2 * module.embed_dim * (2 * query.numel() + key.numel() + value.numel())
        else:
            fan_in = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            total[0] += 2 * output.numel() * fan_in

    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in model.modules()
        if id(module) not in inside
        # Conv1D: Hugging Face's linear layer of GPT-2, its weight transposed.
        and (isinstance(module, (SMoE, nn.Linear, nn.MultiheadAttention)) or type(module).__name__ == "Conv1D")
    ]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()
