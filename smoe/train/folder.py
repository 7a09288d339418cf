"""The folder one run lives in.

config.yaml  metrics.jsonl  tensorboard/  checkpoints/step-XXXXXXXX/  result.json  predictions.jsonl (some tasks)
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

from smoe.earlier import with_earlier
from smoe.errors import RunError
from smoe.files import lock_file, write_atomic
from smoe.train.config import TrainConfig, to_dict
from smoe.train.processes import Processes
from smoe.train.resume import MAY_CHANGE, check_same_config, read_config
from smoe.yaml_files import to_yaml


class RunFolder:
    """Paths of one run, and whole-file writes by the main process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.result_path = self.path / "result.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self._lock_path, self._lock = self.path / ".training.lock", -1

    def lock(self) -> None:
        """Locks the folder as long as this object lives. ValueError when another process holds the lock."""
        self._lock = lock_file(self._lock_path)
        weakref.finalize(self, os.close, self._lock)

    def check_there(self) -> None:
        """RunError unless ``path`` is still the folder that this process has locked: what it writes would be lost."""
        if self._lock < 0:  # nobody has locked it
            return
        try:
            same = os.path.samestat(os.stat(self._lock_path), os.fstat(self._lock))
        except OSError:
            same = False
        if not same:
            raise RunError(
                f"run folder {self.path} was removed, renamed or replaced while the run wrote to it; "
                "nothing more is written; put it back and --resume goes on from its newest checkpoint"
            )

    def write_result(self, result: Mapping[str, object]) -> None:
        """Writes result.json in one piece. Raises ValueError for NaN or infinity: not JSON."""
        try:
            content = json.dumps(result, indent=2, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"result.json: {error}; every number must be finite") from None
        write_atomic(self.result_path, content + "\n")


def open_run(config: TrainConfig, processes: Processes) -> RunFolder:
    """Starts the run in ``run_dir``; with ``resume`` it goes on with a run that is there.

    The main process checks and writes for all, and holds the folder's lock as long as ``RunFolder`` lives. Raises
    ValueError when another process holds it, when a run is there and ``resume`` is not set, when a field differs that
    may not (``MAY_CHANGE``), or when the folder holds parts of a run without its config.yaml.
    """
    folder = RunFolder(config.run_dir)
    with processes.together():
        if processes.is_main:
            if processes.restarted and not folder.config_path.exists():
                raise RunError(f"run folder {folder.path} was removed or renamed; the restarted run has nothing left")
            _start_or_check(folder, config)
            processes.opened()
    with processes.together():
        if not folder.config_path.exists():
            raise ValueError(f"run_dir: {folder.path} must be a folder that all processes share")
    return folder


def _start_or_check(folder: RunFolder, config: TrainConfig) -> None:
    given = to_dict(config)
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"run_dir: {folder.path} is a file; name a folder")
    if folder.config_path.exists():
        if not config.resume:
            raise ValueError(f"run_dir: {folder.path} already holds a run; --resume continues it, or choose another")
        recorded = with_earlier(read_config(folder.path), given)
        check_same_config(recorded, given, MAY_CHANGE, folder.config_path)
        if folder.metrics_path.exists() and not folder.checkpoints.is_dir():
            gone = "metrics.jsonl but no folder checkpoints any more; put it back, or choose another folder"
            raise ValueError(f"run_dir: {folder.path} has {gone}")
    for part in (folder.checkpoints, folder.metrics_path, folder.result_path):
        if part.exists() and not folder.config_path.exists():
            raise ValueError(f"run_dir: {folder.path} has {part.name} but no config.yaml; choose another folder")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.lock()
    for left in folder.path.glob(".*.tmp-*"):  # by a write that was killed
        left.unlink(missing_ok=True)
    write_atomic(folder.config_path, to_yaml(given))
    folder.checkpoints.mkdir(exist_ok=True)  # after it: without config.yaml they could not be continued
