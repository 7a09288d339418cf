"""A modulized Llama, Mistral or Qwen3 -> a plain Mixtral or Qwen3-MoE that Transformers runs without smoe."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..control import activated, check_whole, get_top_k
from ..modulize.card import is_somebodys
from ..modulize.folder import CONFIG
from ..modulize.save import bare, check_tensors, replace_files
from ..modulize.tokenizer import check_tokenizer, save_tokenizer
from ..router import check_top_k
from .card import write_card
from .targets import Plan, Target, plan_export


@torch.no_grad()
def to_hf(
    model: nn.Module,
    out: str | Path,
    *,
    top_k: int | None = None,
    tokenizer: Any = None,
    metrics: Mapping[int, Mapping[str, float]] | None = None,
) -> Path:
    """Writes ``model`` into the folder ``out`` as an architecture of Transformers that has experts of its own.

    A modulized Llama or Mistral becomes a Mixtral, a Qwen3 a Qwen3-MoE. It computes the same at every k, without smoe:
    ``AutoModelForCausalLM.from_pretrained(out, num_experts_per_tok=k)``. Slimmed models work too; models with some
    dense layers if they are Qwen3. ``model`` stays as it is.

    What is exact: ``score="softmax_after_topk"``, for Qwen3 ``"softmax_before_topk"`` too; a random or learned router
    without bias; any ``output_scale``, which is multiplied into the experts' last matrix. ``output_scale="k"`` is right
    at one k alone. In bfloat16 and float16 the target routes in that precision, where smoe routes in float32, so a few
    tokens go to other experts.

    Args:
        model: made by :func:`smoe.modulize`; DDP and ``torch.compile`` around it are looked through.
        out: the folder. What it holds of an earlier model is replaced at the end, when all new files are complete;
            a README.md of somebody else's stays.
        top_k: k of the exported model, as long as nobody asks for another; None: the k that ``model`` has.
        tokenizer: with ``save_pretrained``, or a folder that holds one. None: the folder that ``model`` came from.
        metrics: k -> name -> value, for the table of the model card (README.md).

    Raises:
        ValueError: no architecture of Transformers computes what ``model`` does. Nothing is written then.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}, which is a file; it must be a folder, new or not")
    model = bare(model)
    check_whole(model, "export")
    check_tensors(model)
    plan = plan_export(model)
    k = _one_k(model, plan, top_k)
    fixed_k = any(layer.output_scale == "k" for layer in plan.layers.values())
    if fixed_k and top_k is None:
        warnings.warn(
            f'output_scale is "k": the exported model is right at k = {k} alone; top_k chooses that k', stacklevel=2
        )
    plan.config.num_experts_per_tok = k
    plan.config.dtype = model.dtype
    check_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".part-") as part, activated(model, k):
        part = Path(part)
        _save_weights(dict(_tensors(model, plan)), part)
        _save_config(model, plan, part)
        save_tokenizer(model if tokenizer is None else tokenizer, part)
        if not is_somebodys(out):
            write_card(part, model, plan, [k] if fixed_k else None, metrics or {})
        replace_files(out, part)
    return out


def _one_k(model: nn.Module, plan: Plan, top_k: int | None) -> int:
    k = get_top_k(model) if top_k is None else top_k
    if isinstance(k, list):
        raise ValueError(f"the layers have different k, {k}; the exported model has one for all: give it as top_k")
    return check_top_k(k, getattr(plan.config, plan.target.num_experts))


def _tensors(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the target under the names that its files have, each once."""
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    blocks = {f"{base}layers.{i}.": layer for i, layer in plan.layers.items()}
    experts = tuple(f"{prefix}mlp." for prefix in blocks)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(experts) and id(tensor) not in seen:  # tied embeddings are one tensor
            seen.add(id(tensor))
            yield name, tensor.detach()
    for prefix, layer in blocks.items():
        yield from _block(f"{prefix}{plan.target.block}.", layer, plan.target)


def _block(prefix: str, layer: Any, target: Target) -> Iterator[tuple[str, Tensor]]:
    """Router and experts of one layer, in copies: slices of one tensor can't be saved one by one."""
    yield f"{prefix}gate.weight", layer.router.weight.detach().clone()
    experts = layer.experts
    for e in range(layer.num_experts):
        for part, tensor in (("gate", experts.gate[e]), ("up", experts.up[e]), ("down", experts.down[e].t())):
            scaled = tensor * layer.scale if part == "down" else tensor.clone()
            yield f"{prefix}experts.{e}.{target.parts[part]}.weight", scaled.contiguous()


def _save_weights(tensors: dict[str, Tensor], part: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, part, metadata={"format": "pt"})


def _save_config(model: nn.Module, plan: Plan, part: Path) -> None:
    plan.config.save_pretrained(part)
    if model.can_generate():
        model.generation_config.save_pretrained(part)
    # Software that follows Transformers before version 5 reads the positions and Qwen3-MoE's N here.
    config = json.loads((part / CONFIG).read_text(encoding="utf-8"))
    config[plan.target.num_experts] = getattr(plan.config, plan.target.num_experts)
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
