"""Tensors out of files of torch.save, whole pickled modules too, without running anything that they name.

Their pickles are followed by `transformer_xl/pickle_program.py`, which builds data and nothing else.

Both formats of torch.save are read: the zip of today and the stream of versions before 1.6.
"""

import errno
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from transformer_xl.pickle_program import (
    MAX_PICKLE_BYTES,
    Damaged,
    StandIn,
    Storage,
    View,
    follow,
    shown,
)

MAX_MODULES, MAX_DEPTH, MAX_NAME = 100_000, 100, 1000

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# What zipfile raises for a damaged one.
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, KeyError, IndexError)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save: saved as such, under `state_dict` or `model`, or that of a whole module.

    Tensors of a whole module have the names that its `state_dict()` gives them. Raises ValueError, in one line, for
    any other file, and OSError.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            content = _read_zip(file) if is_zip else _read_legacy(file)
        return {name: view.tensor() for name, view in _state_dict(content).items()}
    except Damaged as error:
        raise ValueError(f"{path}: {error}") from None


def _state_dict(content: Any) -> dict[str, View]:
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), (dict, StandIn)):
                return _state_dict_of(content[key])
    return _state_dict_of(content)


def _state_dict_of(content: Any) -> dict[str, View]:
    if isinstance(content, StandIn):
        return dict(_module_tensors(content))
    if isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, View) for k, v in content.items()):
        return content
    raise Damaged(f"holds a {type(content).__name__} that is no state dict (names to tensors) and no module")


def _module_tensors(root: StandIn) -> Iterator[tuple[str, View]]:
    """What `root.state_dict()` would hold."""
    waiting, seen = [(root, "", 0)], 0
    while waiting:
        module, prefix, depth = waiting.pop()
        seen += 1
        if seen > MAX_MODULES or depth > MAX_DEPTH or len(prefix) > MAX_NAME:
            raise Damaged("holds modules within modules without end")
        state = module.state
        parts = [state.get(part) if isinstance(state, dict) else None for part in ("_parameters", "_buffers")]
        modules = state.get("_modules") if isinstance(state, dict) else None
        if not all(isinstance(part, dict) for part in (*parts, modules)):
            raise Damaged(f"holds a {shown(module.kind)}, which is neither a state dict nor a module")
        unsaved = state.get("_non_persistent_buffers_set")
        unsaved = _members(unsaved) if isinstance(unsaved, StandIn) else []
        for number, part in enumerate(parts):
            for name, value in part.items():
                if value is None or number == 1 and name in unsaved:
                    continue
                if not isinstance(value, View):
                    raise Damaged(f"has something else than a tensor at {shown(f'{prefix}{name}')}")
                yield f"{prefix}{name}", value
        children = [(child, f"{prefix}{name}.", depth + 1) for name, child in modules.items() if child is not None]
        if not all(isinstance(child, StandIn) for child, _, _ in children):
            raise Damaged("holds a module with a part that is no module")
        waiting += reversed(children)


def _members(kept: StandIn) -> list[Any]:
    """What a set holds, whichever protocol wrote it."""
    given = kept.arguments[0] if kept.arguments else []
    return [*(given if isinstance(given, list) else []), *kept.items]


# ---- the two formats


def _read_zip(file: IO[bytes]) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            total = file.seek(0, 2)
            if len(entries) != len(archive.infolist()) or len(pickles) != 1:
                raise Damaged("is no file of torch.save (a .zip with other files in it)")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise Damaged("has a compressed part, which torch.save does not write")
            if sum(entry.file_size for entry in entries.values()) > total:
                raise Damaged("has parts that are larger than the file")
            top, pickled = pickles[0].removesuffix("data.pkl"), entries[pickles[0]]
            if pickled.file_size > MAX_PICKLE_BYTES:
                raise Damaged(f"has a pickle of {pickled.file_size} bytes, expected at most {MAX_PICKLE_BYTES}")
            if f"{top}byteorder" in entries and archive.read(f"{top}byteorder") != b"little":
                raise Damaged("was written with another order of bytes")
            content, storages = follow(io.BytesIO(archive.read(pickled)))
            for storage in storages.values():
                if f"{top}data/{storage.key}" not in entries:
                    raise Damaged(f"lacks the numbers of storage {shown(storage.key)}")
                _fill(storage, archive.read(f"{top}data/{storage.key}"))
            return content
    except (*_DAMAGED_ZIP, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a place before the file's start
            raise
        raise Damaged(f"is a damaged .zip ({shown(error)})") from None


def _read_legacy(file: IO[bytes]) -> Any:
    total = file.seek(0, 2)
    file.seek(0)
    magic, protocol, system = (follow(file)[0] for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise Damaged("is no file of torch.save")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Damaged("was written with another order of bytes")
    content, storages = follow(file)
    keys, _ = follow(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != storages.keys():
        raise Damaged("lists other numbers than it uses")
    for key in dict.fromkeys(keys):
        storage, count = storages[key], int.from_bytes(file.read(8), "little")
        size = storage.numel * storage.dtype.itemsize
        if count != storage.numel or size > total - file.tell():
            raise Damaged(f"is cut off or damaged at the numbers of storage {shown(key)}")
        _fill(storage, file.read(size))
    return content


def _fill(storage: Storage, data: bytes) -> None:
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise Damaged(f"has {len(data)} bytes for the {storage.numel} numbers of storage {shown(storage.key)}")
    if storage.dtype == torch.bool:
        storage.data = torch.frombuffer(bytearray(data), dtype=torch.uint8).ne(0) if data else torch.empty(0).bool()
    elif data:
        storage.data = torch.frombuffer(bytearray(data), dtype=storage.dtype)
    else:
        storage.data = torch.empty(0, dtype=storage.dtype)
