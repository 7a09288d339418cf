"""What a run measured, step by step: lines of JSON that survive a crash, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from smoe.files import write_atomic
from smoe.run.folder import RunFolder


class MetricsLogger:
    """Appends `{"step": .., ...}` lines to metrics.jsonl and the numbers in them to TensorBoard.

    `resume_step` is the step the run really continues from: lines of later steps are dropped, since they will be
    written again. -1 drops all (a run that starts over); None keeps all and only removes a line cut off by a crash.
    A folder whose `is_main` is false logs nothing.
    """

    def __init__(self, folder: RunFolder | str | Path, resume_step: int | None = None) -> None:
        self.folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        self._file: TextIO | None = None
        self._board: Any = None
        if not self.folder.is_main:
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        _repair(self.folder.metrics_path, resume_step)
        self._file = open(self.folder.metrics_path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(self.folder.tensorboard), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line and flush it. Nested mappings become TensorBoard tags `a/b`; NaN and infinity become null."""
        if self._file is None:
            return
        line = json.dumps(_finite({"step": step, **metrics}), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if self._board is not None:
            for tag, value in _scalars(metrics):
                self._board.add_scalar(tag, value, step)
            self._board.flush()

    def close(self) -> None:
        """Close both logs. Later `log` calls do nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(folder: RunFolder | str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order; one cut off at the end is left out. Empty when there is no file."""
    path = (folder if isinstance(folder, RunFolder) else RunFolder(folder)).metrics_path
    return [line for _, line in _whole_lines(path)] if path.exists() else []


def _repair(path: Path, resume_step: int | None) -> None:
    if not path.exists():
        return
    kept = "".join(
        text + "\n" for text, line in _whole_lines(path) if resume_step is None or line.get("step", 0) <= resume_step
    )
    if kept.encode() != path.read_bytes():
        write_atomic(path, kept)


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
        if isinstance(line, dict):
            yield text.decode(), line


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; and a one-element tensor or NumPy number is a number here."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif hasattr(value, "item") or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield f"{prefix}{key}", float(value)
