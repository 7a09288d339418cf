"""Saving and loading models with SMoE layers: safetensors and JSON, no pickles, no remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..control import check_whole, set_top_k
from .convert import place
from .find import FoundMLP, find_mlps
from .record import VERSION, describe
from .trial import is_transposed

WEIGHTS, CONFIG, OWN_CONFIG = "model.safetensors", "config.json", "smoe.json"


def save_pretrained(model: nn.Module, path: str | Path) -> Path:
    """Writes ``model`` into the folder ``path``: ``model.safetensors``, and under the key ``smoe`` what was done to it.

    A Hugging Face model's ``config.json`` (and ``generation_config.json``) carry the key; any other model gets an
    ``smoe.json``. Works for modulized, slimmed and demodulized models alike, and for untouched ones.
    """
    from safetensors.torch import save_model

    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"path is {str(path)!r}, which is a file; it must be a folder, new or not")
    check_whole(model, "save_pretrained")
    path.mkdir(parents=True, exist_ok=True)
    record = describe(model)
    written = path / f"{WEIGHTS}.part"  # a crash meanwhile leaves the weights that were there
    save_model(model, str(written), metadata={"format": "pt"})
    written.replace(path / WEIGHTS)
    config = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        config.save_pretrained(path)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(path)
        target = path / CONFIG
        (path / OWN_CONFIG).unlink(missing_ok=True)
    else:
        target = path / OWN_CONFIG
    settings = json.loads(target.read_text()) if target.exists() and target.name == CONFIG else {}
    settings.pop("smoe", None)
    if record is not None:
        settings["smoe"] = record
    target.write_text(json.dumps(settings, indent=2) + "\n")
    return path


def from_pretrained(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model that :func:`save_pretrained` wrote, in evaluation mode.

    Args:
        path: the folder.
        model: the dense model, built the way it was before ``modulize``; needed unless it is one of Hugging Face's
            (then the config says what to build). It is changed in place and returned.
        top_k: k of every SMoE layer; None leaves the k it was saved with.
        dtype, device: of the model. Weights are cast to ``dtype``; None keeps the one the config names.

    Raises:
        ValueError: the folder holds no such model, or ``model`` is not what it was saved from.
    """
    from safetensors.torch import load_model

    path = Path(path)
    own, config = path / OWN_CONFIG, path / CONFIG
    settings_file = own if own.exists() else config
    for file in (settings_file, path / WEIGHTS):
        if not file.exists():
            raise ValueError(f"{str(path)!r} holds no {file.name}; it must be a folder that smoe.save_pretrained wrote")
    record = json.loads(settings_file.read_text()).get("smoe")
    if record is not None and record.get("version") != VERSION:
        raise ValueError(f"{settings_file.name} has smoe version {record.get('version')!r}; this smoe reads {VERSION}")
    if model is None:
        if settings_file == own:
            raise ValueError(f"{str(path)!r} was saved from a model of your own; pass it, as it was built: model=...")
        model = _build(path)
    if dtype is not None:
        model.to(dtype)
    model.to(device)
    if record is not None:
        _repeat(model, record)
    try:
        load_model(model, str(path / WEIGHTS), strict=True, device=str(device))
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"the weights in {str(path)!r} don't fit {type(model).__name__}: {lines}") from None
    if top_k is not None:
        set_top_k(model, top_k)
    return model.eval()


def _build(path: Path) -> nn.Module:
    """The dense Hugging Face model that the config describes, with weights drawn at random."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    if hasattr(config, "smoe"):
        del config.smoe
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None or not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(f"config.json names the architecture {name}, which transformers lacks; pass it: model=...")
    dtype = getattr(config, "dtype", None)
    model = model_class(config)
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    if (path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _repeat(model: nn.Module, record: dict[str, Any]) -> None:
    """Does to a dense ``model`` what ``record`` says; the weights don't matter yet."""
    found = {mlp.name: mlp for mlp in find_mlps(model)}
    names = [*record["layers"], *record["widths"]]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"the record has an MLP at {missing[0]}, but {type(model).__name__} has them at {', '.join(found)}"
        )
    for name, width in record["widths"].items():
        _narrow(found[name], width)
    plan = []
    for name, entry in record["layers"].items():
        options = dict(entry)
        _narrow(found[name], options.pop("d_hidden"))
        plan.append((found[name], options))
    if plan:
        place(model, plan)


def _narrow(found: FoundMLP, width: int) -> None:
    """Makes the dense MLP ``width`` units wide (its weights are about to be loaded)."""
    if width == found.d_hidden:
        return
    match = found.match
    for linear in (match.up, match.gate, match.down):
        if linear is None:
            continue
        weight = linear.weight.t() if is_transposed(linear) else linear.weight  # (out, in)
        if linear is match.down:
            weight = weight[:, :width]
        else:
            units = 2 * width if match.fused else width
            weight = weight[:units]
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[:units].detach().clone(), linear.bias.requires_grad)
        outputs, inputs = weight.shape
        if is_transposed(linear):
            weight, linear.nf, linear.nx = weight.t(), outputs, inputs
        else:
            linear.out_features, linear.in_features = outputs, inputs
        weight = weight.detach().clone(memory_format=torch.contiguous_format)
        linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
    match.down.smoe_width = width
