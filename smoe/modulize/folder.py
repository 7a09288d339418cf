"""The files of a saved model: JSON and safetensors, read with an eye to damage. No pickles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import one_line
from ..json_files import load_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, OWN_CONFIG = "config.json", "smoe.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Header(NamedTuple):
    """A tensor in a file: its shape, and its dtype if that is a floating-point one."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def brief(name: str) -> str:
    """A name from a file, in a message: as it is, unless it is long or has odd characters."""
    return name if len(name) <= 100 and name.isprintable() else short(name)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        ValueError: it holds none; one line says why.
    """
    try:
        value = load_json(file, nan=False)
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds {short(value)}; it must hold an object")
    return value


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the folder ``path``: one, or the shards that an index names.

    Raises:
        ValueError: there are none, some are missing, or both kinds are there.
    """
    single, index = path / WEIGHTS, path / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{str(path)!r} holds both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{str(path)!r} holds no {WEIGHTS}; it must be a folder that smoe.save_pretrained or Transformers wrote "
            "(pickles are not read)"
        )
    files = [path / name for name in shards_of(path)]
    for file in files:
        if not os.path.isfile(file):  # Path.is_file raises an error for a name that is too long
            raise ValueError(f"{str(path)!r} holds no {brief(file.name)}, which {INDEX} names")
    return files


def shards_of(path: Path) -> list[str]:
    """The file names in the index of the folder ``path``, each once; none if it has no index."""
    if not (path / INDEX).is_file():
        return []
    shards = read_json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{INDEX}: weight_map is {short(shards)}; it must name the file of every tensor")
    names = list(dict.fromkeys(map(str, shards.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {brief(name)}; it must be a safetensors file in the same folder")
    return names


def read_headers(files: list[Path]) -> dict[str, Header]:
    """What ``files`` hold, by name, without reading the tensors."""
    headers: dict[str, Header] = {}
    for file in files:
        with _reading(file) as opened:
            for name in opened.keys():
                if name in headers:
                    raise ValueError(f"{file.name} holds {brief(name)}, which another file holds too")
                part = opened.get_slice(name)
                headers[name] = Header(tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
    return headers


def read_tensors(files: list[Path]) -> Iterator[dict[str, Tensor]]:
    """The tensors by name, file after file."""
    for file in files:
        with _reading(file) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        yield tensors


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """A safetensors file, opened. What its library says of a damaged one becomes a ValueError of one line."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file.name} is damaged: {one_line(error)}") from None
