"""Saving models with SMoE layers: safetensors and JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..control import check_whole
from ..experts import is_int8
from .card import CARD, is_somebodys, write_card
from .folder import CONFIG, INDEX, OWN_CONFIG, WEIGHTS, shards_of
from .hook import is_transformers_model, record_when_saving
from .record import describe, plain_name
from .tokenizer import check_tokenizer, save_tokenizer


def save_pretrained(model: nn.Module, path: str | Path, *, tokenizer: Any = None) -> Path:
    """Writes ``model`` into the folder ``path``: its weights, and under the key ``smoe`` what was done to its MLPs.

    A Transformers model is written as its own ``save_pretrained`` does, with the key in ``config.json``, and if it has
    experts a model card, README.md, unless the folder has one of somebody else's. Any other model gets
    ``model.safetensors`` and ``smoe.json``. Works for models with SMoE layers, slimmed and demodulized ones, and for
    models that were never changed. DDP, ``nn.DataParallel`` and ``torch.compile`` around the model are looked through.
    What the folder holds is replaced at the end, when all new files are complete.

    Args:
        tokenizer: with ``save_pretrained``, or a folder that holds one. None: the files of the one in the folder that a
            Transformers model came from, if any.

    Raises:
        ValueError: path is a file, ``tokenizer`` is a folder without one, or the model's tensors can't be saved as they
            are (spread over ranks, on the meta device, under PEFT adapters). Nothing is written then.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"path is {str(path)!r}, which is a file; it must be a folder, new or not")
    model = bare(model)
    check_whole(model, "save_pretrained")
    check_tensors(model)
    check_tokenizer(tokenizer)
    record = describe(model)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".part-") as part:
        if is_transformers_model(model):
            record_when_saving()
            model.save_pretrained(part)
            save_tokenizer(model if tokenizer is None else tokenizer, Path(part))
            if not is_somebodys(path):
                write_card(model, Path(part))
        else:
            _save_tensors(model, Path(part) / WEIGHTS)
            settings = {} if record is None else {"smoe": record.to_json()}
            (Path(part) / OWN_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
            if tokenizer is not None:
                save_tokenizer(tokenizer, Path(part))
        replace_files(path, Path(part))
    return path


def bare(model: nn.Module) -> nn.Module:
    """The model inside DDP, ``nn.DataParallel``, ``AveragedModel`` and ``torch.compile``."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def check_tensors(model: nn.Module) -> None:
    """A ValueError if the state dict is not plain tensors with values, under the model's own names."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{name or type(model).__name__} is a {type(module).__name__} of PEFT; call merge_and_unload() and "
                "save what it returns, or save the adapters alone with PEFT"
            )
    state = model.state_dict()
    for name, value in state.items():
        if hasattr(value, "to_local"):  # a DTensor
            raise ValueError(f"{name} is spread over ranks (FSDP, tensor parallel); save the model once it is whole")
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            if is_int8(value):
                raise ValueError(
                    f"{name} is int8; save the model before to_int8, or its tensors with "
                    "torch.save(model.state_dict(), file)"
                )
            strided = not isinstance(value, Tensor) or value.layout == torch.strided
            kind = type(value).__name__ if strided else f"{value.layout} tensor"
            raise ValueError(f"{name} is a {kind}; only plain tensors can be saved")
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device, without values; load the model's weights first")
    names = {plain_name(name) for name in state}
    record = describe(model)
    for name in () if record is None else (*record.layers, *record.placed):
        experts = f"{name}.mlp.experts" if name in record.layers else f"{name}.experts".lstrip(".")
        if f"{experts}.up" not in names:
            raise ValueError(f"{experts}.up has another name among the model's weights; save it before it is wrapped")


def _save_tensors(model: nn.Module, file: Path) -> None:
    """The state dict, each tensor once: tied ones and shared modules are found again by their identity on loading."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    places: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in places:
            continue
        places[place] = name
        # A copy where another tensor holds a different part of the same memory.
        shared = value.untyped_storage().data_ptr() in storages
        storages.add(value.untyped_storage().data_ptr())
        value = value.detach().contiguous()
        tensors[plain_name(name)] = value.clone() if shared else value
    save_file(tensors, str(file), metadata={"format": "pt"})


def replace_files(path: Path, part: Path) -> None:
    """Moves the files of ``part`` into ``path`` and removes what is left there of an earlier model."""
    new = {file.name for file in part.iterdir()}
    old = {CONFIG, OWN_CONFIG, WEIGHTS, INDEX} | (set() if is_somebodys(path) else {CARD})
    try:
        old |= set(shards_of(path))
    except ValueError:
        pass  # a damaged index doesn't say which shards there are
    for name in sorted(new, key=lambda name: not name.endswith(".safetensors")):  # weights first
        os.replace(part / name, path / name)
    for name in old - new:
        (path / name).unlink(missing_ok=True)
