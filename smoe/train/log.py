"""What a training says of itself: lines on the screen, a progress bar, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from smoe.errors import RunError
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
        self.nats = torch.zeros(2, dtype=torch.float64)
        self._file = self._board = None
        config, done = task.config, 0 if checkpoint is None else checkpoint.step
        if processes.is_main:
            if checkpoint is not None:
                drop_later_lines(folder.metrics_path, done)
                self.nats = torch.tensor(checkpoint.state["nats"], dtype=torch.float64)
            self._file = open(folder.metrics_path, "w" if checkpoint is None else "a", encoding="utf-8")
            with contextlib.suppress(ImportError):  # TensorBoard need not be installed
                from torch.utils.tensorboard import SummaryWriter

                # An error of its thread comes again with the next flush; the traceback on the screen says no more.
                threading.excepthook = lambda e: issubclass(e.exc_type, OSError) or threading.__excepthook__(e)
                self._board = SummaryWriter(str(folder.tensorboard), purge_step=done + 1)
        self._bar = tqdm(total=config.steps, initial=done, unit="step", desc=config.get_method().title,
                         dynamic_ncols=True, disable=not (processes.is_main and config.progress),
                         mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
        self.new_interval()

    def new_interval(self) -> None:
        """Tokens per second count from here: what came before (an evaluation, a checkpoint) is left out."""
        self._interval_start, self._interval_steps = time.perf_counter(), 0

    def count(self, loss: MethodLoss | None) -> None:
        """Adds the loss of a step to the mean; None of one that was left out."""
        if loss is not None:
            self.nats += torch.tensor([loss.task.item(), 1.0], dtype=torch.float64)
        self._interval_steps += 1
        self._bar.update()

    def train(
        self,
        step: int,
        loss: MethodLoss,
        ks: list[int],
        learning_rate: float,
        norm: Tensor,
        seconds: float,
        skipped: int = 0,
    ) -> None:
        """One line about the steps since the last one. ``k``: one number, or one per layer where they differ.

        ``skipped``: steps of the run that were left out so far, in the line where there are any.
        """
        nats, steps = self.processes.sum(self.nats).tolist()
        tokens = self._interval_steps * self.task.tokens_per_step
        speed = tokens / (time.perf_counter() - self._interval_start)
        mean, k, decides = nats / steps if steps else math.nan, one_or_all(ks), self.task.metrics[0]
        line = {"loss": mean, "lr": learning_rate, "grad_norm": float(norm)}
        if decides.nats:
            line[decides.key] = mean / math.log(2)
        line |= {"k": k, "tokens_per_second": speed} | {name: part.item() for name, part in loss.parts.items()}
        self._write(step, "train", line | ({"skipped": skipped} if skipped else {}), seconds)
        shown = decides.shown(line) if decides.nats else f"loss {mean:.4f}"
        self._bar.set_postfix_str(f"{shown}{at_k(k)}, {speed:,.0f} tokens/s", refresh=False)
        self.nats.zero_()
        self.new_interval()

    def evaluation(self, step: int, split: str, measured: Measured, k: int | None, seconds: float) -> None:
        """One line about an evaluation; ``valid_k16``, say, where not the first of ``config.eval_ks()`` was asked."""
        name = split if k == self.task.config.eval_ks()[0] else f"{split}_k{k}"
        self._write(step, name, measured.values, seconds)
        if self.processes.is_main:
            self._bar.write(f"step {step}: {split} {self.task.metrics[0].shown(measured.values)}{at_k(k)}")

    def _write(self, step: int, split: str, values: dict[str, Any], seconds: float) -> None:
        """A line of JSON, flushed, and TensorBoard tags ``split/name``. NaN and infinity become null."""
        if self._file is None:
            return
        self.folder.check_there()
        values = json.loads(json.dumps(values), parse_constant=lambda _: None)
        print(json.dumps({"step": step, split: values, "seconds": seconds}), file=self._file, flush=True)
        if self._board is not None:
            tags = {f"{split}/{name}": value for name, value in values.items()} | {"seconds": seconds}
            if isinstance(values.get("k"), list):
                tags |= {f"{split}/k/{layer}": k for layer, k in enumerate(tags.pop(f"{split}/k"))}
            try:
                for tag, value in tags.items():
                    if value is not None:
                        self._board.add_scalar(tag, value, step)
                self._board.flush()
            except OSError as error:  # it opens its file by name, each time
                self.folder.check_there()
                raise RunError(f"{self.folder.tensorboard} can't be written: {error.strerror}") from None

    def close(self) -> None:
        """Closes the bar and the files."""
        for part in (self._bar, self._file, self._board):
            if part is not None:
                part.close()


def print_header(task: Task, processes: Processes) -> None:
    """Says what is about to run."""
    config, method, k = task.config, task.config.get_method(), ""
    if method.routed:
        k_min, k_max, mode = config.k_schedule()
        k = f", {config.num_experts} experts, k = {k_min}..{k_max} ({mode})"
        if len(config.smoe_layers()) < config.num_layers:
            k += f" in layers {', '.join(map(str, config.smoe_layers()))}"
    devices = f"{processes.world_size} x {processes.device.type}"
    devices += f" (experts over {config.expert_parallel})" if config.expert_parallel > 1 else ""
    devices += " (sharded)" if config.fsdp else ""
    parameters = sum(p.numel() for p in task.model.parameters())
    size = f"{parameters:,} parameters, {config.steps} steps of {task.step_shape}"
    print(f"{task.title}, {method.title}{k}, seed {config.seed}, run folder {config.run_dir}", flush=True)
    print(f"scale {config.scale} ({config.scale_reason}): {size}, {devices}, precision {config.precision}", flush=True)
    for note in task.notes():
        print(note, flush=True)


def one_or_all(ks: list[int]) -> int | list[int] | None:
    """The k of all layers: one number where they agree, None for a dense model."""
    return None if not ks else ks[0] if len(set(ks)) == 1 else ks


def at_k(k: int | list[int] | None) -> str:
    """`` at k = 8``, or nothing for a dense model."""
    return "" if k is None else f" at k = {', '.join(map(str, k)) if isinstance(k, list) else k}"
