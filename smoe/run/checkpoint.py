"""Checkpoints that a crash, a kill or a full disk cannot spoil: safetensors and JSON, sealed by hashes and a rename.

    checkpoints/step-00000200/  model.safetensors  optimizer.safetensors  rng-rank0.safetensors  ...  state.json

Files are written in `.tmp-step-*`, forced to the disk, and the folder is renamed once whole. `state.json` carries the
size and SHA-256 of every file and of itself, so a checkpoint damaged later is noticed and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoe.errors import CheckpointError, one_line
from smoe.files import fsync_path
from smoe.run.state import flatten_optimizer, restore_optimizer, restore_rng, rng_tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "flatten_optimizer",
    "list_steps",
    "load_checkpoint",
    "load_latest",
    "restore_optimizer",
    "restore_rng",
    "rng_tensors",
    "save_checkpoint",
]

_FORMAT = 1
_TEMPORARY, _REPLACED = ".tmp-", ".old-"


@dataclass
class Checkpoint:
    """What a checkpoint holds. `tensors[group][name]` are on the CPU; `skipped` lists newer ones that are damaged."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path
    skipped: list[tuple[Path, str]] = field(default_factory=list)


class CheckpointWriter:
    """Writes one checkpoint, by one process or by several.

    Every process makes a writer for the same folder and step. The main one calls `begin()`; after a barrier each calls
    `write()` for its own groups (`memory-rank3`); after another barrier the main one calls `seal()`. Until then
    nothing shows under the checkpoint's name.
    """

    def __init__(self, folder: str | Path, step: int) -> None:
        """`folder` is the run's `checkpoints` folder, `step` the number of finished optimizer steps."""
        self.folder = Path(folder)
        self.step = step
        self.name = _name(step)
        self.path = self.folder / self.name
        self.temporary = self.folder / (_TEMPORARY + self.name)

    def begin(self) -> None:
        """Make the temporary folder, and clear what an interrupted save left (main process)."""
        with self._one_clear_error("making a folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
            _clean(self.folder)
            self.temporary.mkdir()

    def write(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `<group>.safetensors` and force it to the disk. Any dtype, shape, layout in memory or sharing goes."""
        from safetensors.torch import save_file

        assert re.fullmatch(r"[A-Za-z0-9_-]+", group), f"group {group!r}: letters, digits, - and _ only"
        with self._one_clear_error(f"writing {group}"):
            file = self.temporary / f"{group}.safetensors"
            save_file(_independent(tensors), file)
            fsync_path(file)

    def seal(
        self, state: Mapping[str, Any], keep: int = 2, protect: Collection[int] = (), expect: Collection[str] = ()
    ) -> Path:
        """Add `state` and the hashes, rename into place, then drop old checkpoints (main process).

        `state` is JSON data with text keys. The newest `keep` steps stay, and those in `protect`. Steps after this one
        are dropped too: they belong to a future that the run left when it resumed before them. `expect` names groups
        that must have been written.
        """
        assert keep >= 1, f"keep {keep}: at least the one just written stays"
        _assert_json(state, "state")
        with self._one_clear_error("sealing"):
            files = {file.name: _fingerprint(file) for file in sorted(self.temporary.iterdir())}
            missing = [group for group in expect if f"{group}.safetensors" not in files]
            if missing:
                raise OSError(f"{', '.join(missing)} not written by its process")
            content = {"format": _FORMAT, "step": self.step, "files": files, "state": state}
            sealed = {"content": content, "sha256": _hash_json(content)}
            (self.temporary / "state.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")
            fsync_path(self.temporary / "state.json")
            fsync_path(self.temporary)
            replaced = self.folder / (_REPLACED + self.name)
            if self.path.exists():  # a folder cannot be replaced in one step; `_candidates` reads the old one meanwhile
                self.path.rename(replaced)
            self.temporary.rename(self.path)
            fsync_path(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        earlier = [step for step in list_steps(self.folder) if step < self.step]
        kept = {self.step, *protect, *sorted(earlier)[len(earlier) - (keep - 1) :]}
        for step in list_steps(self.folder):
            if step not in kept:
                shutil.rmtree(self.folder / _name(step), ignore_errors=True)
        return self.path

    def abort(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    @contextmanager
    def _one_clear_error(self, doing: str) -> Iterator[None]:
        """Whatever goes wrong, remove the unfinished folder; make a disk's error one CheckpointError line."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            self.abort()
            last = list_steps(self.folder)
            left = f"the last one there is {_name(last[-1])}" if last else "there is none before it"
            reason = one_line(getattr(error, "strerror", None) or error)
            raise CheckpointError(f"checkpoint {self.name} in {self.folder}: {reason} while {doing}; {left}") from None
        except BaseException:
            self.abort()
            raise


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
    protect: Collection[int] = (),
) -> Path:
    """Write a whole checkpoint from one process; see `CheckpointWriter` for several.

    Raises CheckpointError when the disk is full or fails; the checkpoints before it are untouched then.
    """
    writer = CheckpointWriter(folder, step)
    writer.begin()
    for group, members in tensors.items():
        writer.write(group, members)
    return writer.seal(state, keep=keep, protect=protect)


def list_steps(folder: str | Path) -> list[int]:
    """Steps that have a finished checkpoint folder, in order. Does not look inside."""
    names = [path.name for path in Path(folder).glob("step-*")] if Path(folder).is_dir() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))


def load_latest(folder: str | Path, groups: Iterable[str] | None = None, clean: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when there is none at all.

    Every file is checked against its hash, so all processes choose the same one; `groups` limits what is then read into
    memory. Damaged newer ones are listed in `skipped` for the caller to print. `clean` removes what an interrupted
    save left: for the main process of a run that continues, before the others read, never for a mere reader.
    Raises CheckpointError when there are only damaged ones.
    """
    folder = Path(folder)
    if clean and folder.is_dir():
        _clean(folder)
    skipped: list[tuple[Path, str]] = []
    for path in _candidates(folder):
        try:
            checkpoint = load_checkpoint(path, groups)
        except CheckpointError as error:
            skipped.append((path, str(error)))
        else:
            checkpoint.skipped = skipped
            return checkpoint
    if skipped:
        reasons = "; ".join(reason for _, reason in skipped)
        raise CheckpointError(f"no usable checkpoint in {folder}: {reasons}")
    return None


def load_checkpoint(path: str | Path, groups: Iterable[str] | None = None) -> Checkpoint:
    """Read one checkpoint folder, e.g. the best one, after checking every file. CheckpointError says what is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        sealed = json.loads((path / "state.json").read_text(encoding="utf-8"))
        content = sealed["content"]
        if _hash_json(content) != sealed["sha256"]:
            raise CheckpointError(f"{path.name}: state.json has changed since it was written")
        if content["format"] != _FORMAT:
            raise CheckpointError(f"{path.name}: format {content['format']}, this version reads {_FORMAT}")
        for name, expected in content["files"].items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise CheckpointError(f"{path.name}: {name} has {size} bytes of {expected['size']}")
            if _fingerprint(path / name) != expected:
                raise CheckpointError(f"{path.name}: {name} has changed since it was written")
        present = [name.removesuffix(".safetensors") for name in content["files"]]
        wanted = present if groups is None else [group for group in present if group in set(groups)]
        tensors = {group: load_file(path / f"{group}.safetensors") for group in wanted}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name}: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: cannot be read ({type(error).__name__}: {one_line(error)})") from None
    return Checkpoint(content["step"], tensors, content["state"], path)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; one moved aside to be replaced counts while its successor is absent."""
    paths = {step: folder / _name(step) for step in list_steps(folder)}
    for path in folder.glob(f"{_REPLACED}step-*") if folder.is_dir() else ():
        paths.setdefault(int(path.name.rpartition("-")[2]), path)
    return [paths[step] for step in sorted(paths, reverse=True)]


def _clean(folder: Path) -> None:
    """Remove unfinished folders, and finish or undo a replacement that was cut off between its two renames."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{_REPLACED}*"):
        original = folder / path.name.removeprefix(_REPLACED)
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(original)


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them; tied ones are written once each."""
    independent: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage)
        independent[name] = tensor
    return independent


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _assert_json(value: Any, where: str) -> None:
    """JSON would silently turn a number used as a key into text; better to stop."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert isinstance(key, str), f"{where}: key {key!r} must be text to survive JSON"
            _assert_json(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _assert_json(item, f"{where}[]")
    else:
        allowed = value is None or isinstance(value, (bool, int, float, str))
        assert allowed, f"{where}: a {type(value).__name__} is not JSON"
