"""What a training says of itself: lines on the screen, a progress bar, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from smoe.methods import MethodLoss
from smoe.train.evaluation import Measured
from smoe.train.folder import RunFolder
from smoe.train.processes import Processes
from smoe.train.resume import Checkpoint, drop_later_lines
from smoe.train.task import Task


class Log:
    """Everything that is logged about one run: the main process writes, all must call.

    ``nats`` is this process's sum of task losses, and their number, since the last line; it survives a resume.
    """

    def __init__(self, task: Task, folder: RunFolder, processes: Processes, checkpoint: Checkpoint | None) -> None:
        """``checkpoint``: where a resumed run goes on; lines of later steps are dropped, they will be written again."""
        self.task, self.folder, self.processes = task, folder, processes
        step = 0 if checkpoint is None else checkpoint.step
        self.nats = torch.zeros(2, dtype=torch.float64)
        self._file: Any = None
        self._board: Any = None
        if processes.is_main:
            if checkpoint is not None:
                self.nats = torch.tensor(checkpoint.state["nats"], dtype=torch.float64)
            self._open_files(step if checkpoint is not None else -1)
        config = task.config
        self._bar = tqdm(total=config.steps, initial=step, desc=config.get_method().title, unit="step",
                         dynamic_ncols=True, disable=not (processes.is_main and config.progress),
                         mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
        self.new_interval()

    def _open_files(self, step: int) -> None:
        """``step``: -1 for a run that starts over, even where a killed one has left lines."""
        drop_later_lines(self.folder.metrics_path, step)
        self._file = open(self.folder.metrics_path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self.folder.tensorboard), purge_step=step + 1)

    def new_interval(self) -> None:
        """Tokens per second count from here: what came before (an evaluation, a checkpoint) is left out."""
        self._interval_start, self._interval_steps = time.perf_counter(), 0

    def count(self, loss: MethodLoss) -> None:
        """Adds the loss of a step to the mean."""
        self.nats += torch.tensor([loss.task.item(), 1.0], dtype=torch.float64)
        self._interval_steps += 1
        self._bar.update()

    def train(
        self, step: int, loss: MethodLoss, ks: list[int], learning_rate: float, norm: Tensor, seconds: float
    ) -> None:
        """One line about the steps since the last one. ``k``: one number, or one per layer where they differ."""
        nats, steps = self.processes.sum(self.nats).tolist()
        tokens = self._interval_steps * self.task.tokens_per_step
        speed = tokens / (time.perf_counter() - self._interval_start)
        mean, k, decides = nats / steps, one_or_all(ks), self.task.metrics[0]
        line = {"loss": mean, "lr": learning_rate, "grad_norm": float(norm)}
        if decides.nats:
            line[decides.key] = mean / math.log(2)
        line |= {"k": k, "tokens_per_second": speed} | {name: part.item() for name, part in loss.parts.items()}
        self._write(step, {"train": line, "seconds": seconds})
        shown = decides.shown(line) if decides.nats else f"loss {mean:.4f}"
        self._bar.set_postfix_str(f"{shown}{at_k(k)}, {speed:,.0f} tokens/s", refresh=False)
        self.nats.zero_()
        self.new_interval()

    def evaluation(self, step: int, split: str, measured: Measured, k: int | None, seconds: float) -> None:
        """One line about an evaluation."""
        self._write(step, {split: measured.values, "seconds": seconds})
        if self.processes.is_main:
            self._bar.write(f"step {step}: {split} {self.task.metrics[0].shown(measured.values)}{at_k(k)}")

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A line of JSON, flushed; nested names become TensorBoard tags ``a/b``; NaN and infinity become null."""
        if self._file is None:
            return
        self._file.write(json.dumps(_finite({"step": step, **metrics}), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for tag, value in _scalars(metrics):
                self._board.add_scalar(tag, value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes the bar and the files."""
        for part in (self._bar, self._file, self._board):
            if part is not None:
                part.close()


def print_header(task: Task, processes: Processes, parameters: int, resumed_after: int | None) -> None:
    """Says what is about to run."""
    if not processes.is_main:
        return
    config, method = task.config, task.config.get_method()
    schedule = ""
    if method.routed:
        k_min, k_max, mode = config.k_schedule()
        schedule = f", {config.num_experts} experts, k = {k_min}..{k_max} ({mode})"
        if len(config.smoe_layers()) < config.num_layers:
            schedule += f" in layers {', '.join(map(str, config.smoe_layers()))}"
    reason = f" ({config.scale_reason})" if config.scale_reason else ""
    devices = f"{processes.world_size} x {processes.device.type}"
    if config.expert_parallel > 1:
        devices += f" (experts over {config.expert_parallel})"
    if config.fsdp:
        devices += " (sharded)"
    lines = [
        f"{task.title}, {method.title}{schedule}, seed {config.seed}, run folder {config.run_dir}",
        f"scale {config.scale}{reason}: {parameters:,} parameters, {config.steps} steps of {task.step_shape}, "
        f"{devices}, precision {config.precision}",
        *task.notes(),
    ]
    if resumed_after is not None:
        lines.append(f"resumed after step {resumed_after}")
    print("\n".join(lines), flush=True)


def one_or_all(ks: list[int]) -> int | list[int] | None:
    """The k of all layers: one number where they agree, None for a dense model."""
    return None if not ks else ks[0] if len(set(ks)) == 1 else ks


def at_k(k: int | list[int] | None) -> str:
    """`` at k = 8``, or nothing for a dense model."""
    return "" if k is None else f" at k = {k if isinstance(k, int) else ', '.join(map(str, k))}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        if isinstance(value, list):  # the k of every layer
            value = {str(layer): k for layer, k in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", float(value)
