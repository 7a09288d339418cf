"""Architectures of Transformers that have experts of their own, and which of our layers they compute exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..layer import SMoE
from ..modulize.swap import Outlet
from ..router.linear import LinearRouter


@dataclass(frozen=True)
class Target:
    """An architecture with experts, by the names in its config and in its files.

    name: what its classes begin with. model_type: in ``config.json``. num_experts, d_expert: the config's fields for N
    and h. scores: our score rule -> the settings that make it the target's. dense_layers: the config's list of layers
    that have a plain MLP; None if all layers have experts. block, parts: the names of the tensors,
    ``model.layers.0.<block>.experts.0.<part>.weight`` and ``model.layers.0.<block>.gate.weight``.
    """

    name: str
    model_type: str
    num_experts: str
    d_expert: str
    scores: Mapping[str, Mapping[str, Any]]
    dense_layers: str | None
    block: str
    parts: Mapping[str, str]


MIXTRAL = Target(
    name="Mixtral",
    model_type="mixtral",
    num_experts="num_local_experts",
    d_expert="intermediate_size",
    scores={"softmax_after_topk": {}},
    dense_layers=None,
    block="block_sparse_moe",
    parts={"gate": "w1", "down": "w2", "up": "w3"},
)
QWEN3_MOE = Target(
    name="Qwen3Moe",
    model_type="qwen3_moe",
    num_experts="num_experts",
    d_expert="moe_intermediate_size",
    scores={"softmax_after_topk": {"norm_topk_prob": True}, "softmax_before_topk": {"norm_topk_prob": False}},
    dense_layers="mlp_only_layers",
    block="mlp",
    parts={"gate": "gate_proj", "down": "down_proj", "up": "up_proj"},
)
# model_type of the dense model -> the target whose attention, norms and embeddings are the same.
TARGETS = {"llama": MIXTRAL, "mistral": MIXTRAL, "qwen3": QWEN3_MOE}

# Fields of the dense models' configs that their targets lack, with the only value at which they change nothing.
_MUST_BE = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"layer_types": None},
    "qwen3": {},
}
# Fields that say nothing about what the target computes, or that are written anew.
_DROPPED = {
    *("architectures", "attention_bias", "dtype", "intermediate_size", "layer_types", "max_window_layers", "mlp_bias"),
    *("model_type", "pretraining_tp", "smoe", "torch_dtype", "transformers_version", "_name_or_path"),
}


@dataclass(frozen=True)
class Plan:
    """What a model becomes.

    architecture: the class of the target. layers: the SMoE layers by index. config: of the target, but for k.
    """

    target: Target
    architecture: str
    layers: dict[int, SMoE]
    config: Any


def plan_export(model: nn.Module) -> Plan:
    """The plan for a modulized model of Transformers.

    Raises:
        ValueError: no target computes what ``model`` does; the message says which rule it breaks.
    """
    import transformers

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    target, name = TARGETS.get(model_type), type(model).__name__
    if target is None or getattr(transformers, name, None) is not type(model):
        raise ValueError(
            f"model is a {name}; only Transformers' own {', '.join(map(str.capitalize, TARGETS))} have a counterpart "
            "with experts"
        )
    architecture = target.name + name.removeprefix(type(model.config).__name__.removesuffix("Config"))
    if not hasattr(transformers, architecture):
        raise ValueError(f"model is a {name}; transformers has no {architecture}")
    _check_same_tensors(model)
    layers, widths = _mlps(model, target)
    for i, layer in layers.items():
        _check_layer(f"layer {i}", layer, target)
    settings = _settings(model.config, target) | _expert_settings(layers, target)
    if widths:
        settings[target.dense_layers] = sorted(widths)
        settings["intermediate_size"] = _only("hidden widths of the dense MLPs", widths)
    config_class = getattr(transformers, f"{target.name}Config")
    return Plan(target, architecture, layers, config_class(architectures=[architecture], **settings))


def _check_same_tensors(model: nn.Module) -> None:
    """A ValueError unless, but for the MLPs, ``model`` has the tensors that its class and config say."""
    import torch

    with torch.device("meta"):
        plain = type(model)(model.config)
    ours, plains = (
        {name: tuple(tensor.shape) for name, tensor in m.state_dict().items() if ".mlp." not in name}
        for m in (model, plain)
    )
    for name in sorted(ours.keys() | plains.keys()):
        if ours.get(name) != plains.get(name):
            raise ValueError(
                f"{name} has shape {ours.get(name)}, but {plains.get(name)} in a {type(model).__name__} of this config"
            )
    inputs, outputs = (get() for get in (model.get_input_embeddings, model.get_output_embeddings))
    tied = outputs is not None and outputs.weight is inputs.weight
    if outputs is not None and tied != model.config.tie_word_embeddings:
        raise ValueError(
            f"config.tie_word_embeddings is {model.config.tie_word_embeddings}, but the embeddings are "
            f"{'' if tied else 'not '}tied"
        )


def _mlps(model: nn.Module, target: Target) -> tuple[dict[int, SMoE], dict[int, int]]:
    """The SMoE layers, and the hidden widths of the MLPs that are dense, by the layer's index."""
    layers: dict[int, SMoE] = {}
    widths: dict[int, int] = {}
    for i, block in enumerate(model.base_model.layers):
        down = block.mlp.down_proj
        if isinstance(down, Outlet):
            layers[i] = down.mlp
        else:
            widths[i] = down.in_features
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer that smoe.modulize made; save it as it is")
    if widths and target.dense_layers is None:
        raise ValueError(f"layer {min(widths)} is dense; {target.name} has experts in every layer")
    return layers, widths


def _check_layer(name: str, layer: SMoE, target: Target) -> None:
    router, experts = layer.router, layer.experts
    if not isinstance(router, LinearRouter):
        raise ValueError(f"{name} has a {type(router).__name__}; {target.name} routes by a linear layer of the token")
    if router.score not in target.scores:
        raise ValueError(
            f"{name} has score={router.score!r}, which {target.name} lacks; it must be {' or '.join(target.scores)}"
        )
    if (router.bias != router.bias[0]).any():  # one number for all experts changes neither choice nor softmax
        raise ValueError(f"{name} has a router with a bias; the router of {target.name} has none")
    if any(bias is not None for bias in (experts.up_bias, experts.gate_bias, experts.down_bias)):
        raise ValueError(f"{name} has experts with a bias; those of {target.name} have none")


def _settings(source: Any, target: Target) -> dict[str, Any]:
    """What the target's config takes over from the dense model's: sizes, attention, positions, embeddings, tokens."""
    settings = source.to_dict()
    for name, value in _MUST_BE[source.model_type].items():
        if settings.get(name) != value:
            raise ValueError(f"config.{name} is {settings[name]!r}, which {target.name} lacks; it must be {value}")
    kept = {name: value for name, value in settings.items() if name not in _DROPPED}
    if source.model_type == "qwen3":
        kinds = set(source.layer_types)
        if len(kinds) > 1:
            raise ValueError(
                f"config.layer_types has both {' and '.join(sorted(kinds))}; {target.name} has one kind of attention"
            )
        kept["use_sliding_window"] = kinds == {"sliding_attention"}
        kept["attention_bias"] = source.attention_bias
    if target is MIXTRAL:
        kept.setdefault("sliding_window", None)
    return kept


def _expert_settings(layers: dict[int, SMoE], target: Target) -> dict[str, Any]:
    score = _only("score rules", {i: layer.router.score for i, layer in layers.items()})
    return {
        target.num_experts: _only("numbers of experts", {i: layer.num_experts for i, layer in layers.items()}),
        target.d_expert: _only("widths of an expert", {i: layer.experts.d_expert for i, layer in layers.items()}),
        **target.scores[score],
    }


def _only(what: str, values: dict[int, Any]) -> Any:
    """The value that all layers have."""
    first = next(iter(values))
    for i, value in values.items():
        if value != values[first]:
            raise ValueError(f"layers {first} and {i} have different {what}, {values[first]} and {value}; one must do")
    return values[first]
