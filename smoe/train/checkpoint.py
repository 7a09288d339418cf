"""Checkpoints that a crash, a kill or a full disk cannot spoil: safetensors and JSON, sealed by hashes and a rename.

    checkpoints/step-00000200/  model.safetensors  optimizer.safetensors  rng-rank0.safetensors  ...  state.json

Files are written in ``.tmp-step-*``, forced to the disk, and the folder is renamed once whole. ``state.json`` carries
the size and SHA-256 of every file and of itself. ``resume.py`` reads them: it notices a damaged one and takes the one
before.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from smoe.errors import CheckpointError, NonFiniteError, RunError, one_line
from smoe.files import fingerprint, fsync_path, hash_json
from smoe.train.processes import Processes

FORMAT = 2
PARTIAL = ".tmp-"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    processes: Processes | None = None,
    keep: int = 2,
    protect: Collection[int] = (),
) -> Path:
    """Writes one checkpoint, by all processes together, then drops all but the newest ``keep`` and ``protect``.

    ``tensors``: by group, a file each; every process gives the groups that it writes. ``state``: JSON data, the main
    process's. Raises CheckpointError when the disk is full or fails; the checkpoints before are untouched then.
    """
    processes = processes or Processes()
    path, partial = checkpoint_path(folder, step), folder / f"{PARTIAL}{checkpoint_path(folder, step).name}"
    with _one_clear_error(partial, "making a folder"), processes.together():
        if processes.is_main:
            for left in folder.glob(f"{PARTIAL}*"):  # by an interrupted save
                shutil.rmtree(left, ignore_errors=True)
            folder.mkdir(exist_ok=True)  # without parents: a run folder that is gone does not come back
            partial.mkdir()
    with _one_clear_error(partial, "writing tensors"), processes.together():
        for group, members in tensors.items():
            if not all(tensor.isfinite().all() for tensor in members.values()):
                raise NonFiniteError(f"{group} has numbers that are not finite")
            file = partial / f"{group}.safetensors"
            # Copies: safetensors wants contiguous tensors on the CPU that share no memory.
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in members.items()}, file)
            fsync_path(file)
    with _one_clear_error(partial, "sealing"), processes.together():
        if processes.is_main:
            files = {file.name: fingerprint(file) for file in sorted(partial.iterdir())}
            content = {"format": FORMAT, "step": step, "files": files, "state": dict(state)}
            assert json.loads(json.dumps(content)) == content, "state: JSON would change it, e.g. a number as a key"
            sealed = {"content": content, "sha256": hash_json(content)}
            (partial / "state.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")
            fsync_path(partial / "state.json")
            fsync_path(partial)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            fsync_path(folder)
    if processes.is_main:
        drop_old(folder, step, keep, protect)
    return path


def drop_old(folder: Path, step: int, keep: int = 2, protect: Collection[int] = ()) -> None:
    """Removes all but the newest ``keep`` checkpoints up to ``step`` and those of ``protect``."""
    # Steps after this one belong to a future that the run left when it resumed before them.
    kept = {*[other for other in list_steps(folder) if other <= step][-keep:], *protect}
    for old in set(list_steps(folder)) - kept:
        shutil.rmtree(checkpoint_path(folder, old), ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is: after as many finished optimizer steps."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps that have a finished checkpoint folder, in order. Does not look inside."""
    names = [path.name for path in folder.glob("step-*")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))


@contextmanager
def _one_clear_error(partial: Path, doing: str) -> Iterator[None]:
    """Whatever goes wrong, removes the unfinished folder; makes a disk's error, on any process, one line.

    It must enclose ``together``: nobody takes the folder away while another process writes into it.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError, RunError)):
            raise
        steps = list_steps(partial.parent)
        left = f"the last one there is {checkpoint_path(partial.parent, steps[-1]).name}" if steps else "there is none"
        reason = one_line(getattr(error, "strerror", None) or error)
        name = partial.name.removeprefix(PARTIAL)
        raise CheckpointError(f"checkpoint {name} in {partial.parent}: {reason} while {doing}; {left}") from None
