"""The folder one run lives in, and who may write to it.

config.yaml  metrics.jsonl  tensorboard/  checkpoints/step-XXXXXXXX/  result.json
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from smoe.files import write_atomic

ALWAYS_MAY_CHANGE = ("resume", "run_dir", "scale_reason")


class RunFolder:
    """Paths and whole-file writes of one run. Only the process with `is_main` writes; the others may hold one too."""

    def __init__(self, path: str | Path, is_main: bool = True) -> None:
        self.path = Path(path)
        self.is_main = is_main
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.result_path = self.path / "result.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        resume: bool = False,
        *,
        may_change: Collection[str] = (),
        is_main: bool = True,
    ) -> RunFolder:
        """Start a run in `path`, or with `resume` continue the one there; with nothing there `resume` simply starts.

        `config` is the whole configuration as plain data (see `config.to_dict`). On resuming, every field must be as
        recorded except those in `may_change` (and `resume`, `run_dir`, `scale_reason`); the record is then
        updated. A process that is not main checks and writes nothing: the main one does it for all.

        Raises ValueError when a run is there and `resume` is not set, when a field differs, or when the folder
        holds parts of a run without its config.yaml.
        """
        folder = cls(path, is_main)
        if not is_main:
            return folder
        from smoe.run.config import from_yaml, to_yaml

        if folder.path.exists() and not folder.path.is_dir():
            raise ValueError(f"run_dir: {folder.path} is a file; name a folder")
        config = from_yaml(to_yaml(config))  # as it will be read back: tuples are lists, paths are text
        if folder.config_path.exists():
            if not resume:
                raise ValueError(
                    f"run_dir: {folder.path} already holds a run; --resume continues it, or choose another folder"
                )
            _check_same(folder.read_config(), config, {*ALWAYS_MAY_CHANGE, *may_change}, folder.config_path)
        else:
            for part in (folder.checkpoints, folder.metrics_path, folder.result_path):
                if part.exists():
                    raise ValueError(
                        f"run_dir: {folder.path} has {part.name} but no config.yaml, so it cannot be continued; "
                        "choose another folder"
                    )
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomic(folder.config_path, to_yaml(config))
        folder.checkpoints.mkdir(exist_ok=True)
        return folder

    @classmethod
    def existing(cls, path: str | Path, is_main: bool = False) -> RunFolder:
        """A run that is already there, for reading (evaluation, reports). ValueError when `path` holds none."""
        folder = cls(path, is_main)
        if not folder.config_path.is_file():
            raise ValueError(f"run: {folder.path} is not a run folder (no config.yaml in it)")
        return folder

    def read_config(self) -> dict[str, Any]:
        """The recorded configuration as plain data. ValueError when it is missing or damaged."""
        from smoe.run.config import load_yaml

        return load_yaml(self.config_path)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json in one piece (main process only). Raises ValueError for NaN or infinity: not JSON."""
        if self.is_main:
            try:
                content = json.dumps(result, indent=2, allow_nan=False)
            except ValueError as error:
                raise ValueError(f"result.json: {error}; every number must be finite") from None
            write_atomic(self.result_path, content + "\n")

    def read_result(self) -> dict[str, Any]:
        """The content of result.json. ValueError when the run has not finished or the file is damaged."""
        return read_result(self.path)


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result from a run folder or from a JSON file. ValueError in one line when there is none to read."""
    path = Path(path)
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"run: {file} does not exist; a run writes it when it finishes")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"run: {file} is not JSON: {error}") from None
    if not isinstance(result, dict):
        raise ValueError(f"run: {file} holds a {type(result).__name__}; a result is a JSON object")
    return result


def _check_same(recorded: Mapping[str, Any], given: Mapping[str, Any], may_change: set[str], source: Path) -> None:
    absent = "(absent)"
    for name in [*recorded, *(name for name in given if name not in recorded)]:
        was, now = recorded.get(name, absent), given.get(name, absent)
        if name not in may_change and was != now:
            raise ValueError(
                f"{name}: {now!r} differs from {was!r} in {source}; resume with the recorded one, or start another run"
            )
