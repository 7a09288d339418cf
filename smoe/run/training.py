"""A run while it trains: what both trainers do before the first step, around each one, and after a signal."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from smoe.errors import NonFiniteError, Stopped
from smoe.methods import MethodLoss
from smoe.parallel import ParallelGroups
from smoe.run.config import to_dict
from smoe.run.folder import RunFolder
from smoe.run.interrupt import StopRequest
from smoe.run.launch import leave, note_opened, together
from smoe.run.metrics import MetricsLogger
from smoe.run.trainer_config import MAY_CHANGE, TrainerConfig


def open_run(config: TrainerConfig, is_main: bool) -> tuple[RunFolder, bool]:
    """The run's folder, made or checked by the main process, and whether the run in it is finished (and says so)."""
    with together():
        folder = RunFolder.open(
            config.run_dir, to_dict(config), resume=config.resume, may_change=MAY_CHANGE, is_main=is_main
        )
        if is_main:
            note_opened()
    with together():
        if not folder.config_path.exists():
            raise ValueError(f"run_dir: {folder.path} must be a folder that all processes share")
        finished = config.resume and folder.result_path.exists()
    if finished and is_main:
        print(f"{config.run_dir} is finished; its result is in {folder.result_path}")
    return folder, finished


def print_header(
    config: TrainerConfig,
    accelerator: Any,
    *,
    name: str,
    parameters: int,
    shape: str,
    lines: Iterable[str] = (),
    resumed_after: int | None = None,
) -> None:
    """What is about to run (main process): the model's name, the shape of a step, and `lines` of what else there is."""
    if not accelerator.is_main_process:
        return
    method = config.get_method()
    schedule = ""
    if method.routed:
        k_min, k_max, mode = config.k_schedule()
        schedule = f", {config.num_experts} experts, k = {k_min}..{k_max} ({mode})"
    reason = f" ({config.scale_reason})" if config.scale_reason else ""
    print(f"{name}, {method.title}{schedule}, seed {config.seed}, run folder {config.run_dir}")
    devices = f"{accelerator.num_processes} x {accelerator.device.type}"
    if config.expert_parallel > 1:
        devices += f" (experts over {config.expert_parallel})"
    if config.fsdp:
        devices += " (sharded)"
    print(
        f"scale {config.scale}{reason}: {parameters:,} parameters, {config.steps} steps of {shape}, {devices}, "
        f"precision {config.precision}"
    )
    for line in lines:
        print(line)
    if resumed_after is not None:
        print(f"resumed after step {resumed_after}")
    sys.stdout.flush()


@dataclasses.dataclass
class Progress:
    """What of a run's past a resumed one must know: seconds of training, the best step, and `nats`: this process's sum
    of task losses and their number since the last line of metrics."""

    seconds: float = 0.0
    best_step: int | None = None
    best_bpc: float | None = None
    nats: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    @property
    def best(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_bpc": self.best_bpc}


class TrainingRun:
    """Metrics, progress bar, evaluation, checkpoints and signals of one run, in the order that both trainers keep.

    A step is `begin_step()`, the trainer's own forward and backward pass, `check_finite(...)`, its optimizer step, then
    `end_step(...)`.
    """

    def __init__(
        self, config: TrainerConfig, folder: RunFolder, accelerator: Any, groups: ParallelGroups, tokens_per_step: int
    ) -> None:
        self.config, self.folder, self.accelerator, self.groups = config, folder, accelerator, groups
        self.tokens_per_step = tokens_per_step
        self.progress = Progress()

    def begin(self, step: int, resumed: bool) -> None:
        """Before the first step of this process, which is the one after `step`."""
        self.stop = StopRequest()
        self.metrics = MetricsLogger(self.folder, resume_step=step if resumed else -1)
        show = self.accelerator.is_main_process and self.config.progress
        self.bar = tqdm(total=self.config.steps, initial=step, desc=self.config.get_method().title, unit="step",
                        dynamic_ncols=True, disable=not show,
                        mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
        self._new_interval()

    def begin_step(self) -> None:
        self._step_start = time.perf_counter()

    def check_finite(self, loss: Tensor, norm: Tensor, step: int, k: int | None, where: str) -> None:
        """Stops before the optimizer step when loss or gradient norm is not finite; every process decides alike.

        `step` counts from 0; `where` says what of the data it read."""
        values = torch.stack([loss.detach().float(), norm.detach().float()]).view(1, 2)
        values = self.accelerator.gather(values)
        if values.isfinite().all():
            return
        what = "the loss" if not values[:, 0].isfinite().all() else "the norm of the gradient"
        raise NonFiniteError(
            f"{what} is not finite at step {step + 1}{_at_k(k)} ({where}); stopped before the optimizer step; "
            f"checkpoints up to the last good one are in {self.folder.checkpoints}"
        )

    def end_step(
        self,
        step: int,
        loss: MethodLoss,
        *,
        k: int | None,
        learning_rate: float,
        norm: Tensor,
        measure: Callable[[int | None], float],
        save: Callable[[], None],
    ) -> bool:
        """After step number `step` (from 1). True: a signal asked to stop, and a checkpoint is written.

        `measure(k)` gives the BPC on valid, `save()` writes a checkpoint; every process calls both."""
        config, progress = self.config, self.progress
        progress.nats += torch.tensor([loss.task.item(), 1.0], dtype=torch.float64)
        progress.seconds += time.perf_counter() - self._step_start
        self._interval_tokens += self.tokens_per_step
        if step % config.log_interval == 0 or step == config.steps:
            self._log(step, loss, k, learning_rate, norm)
        self.bar.update()
        evaluate_now = step % config.eval_interval == 0 or step == config.steps
        if evaluate_now:
            bpc = measure(config.eval_k())
            self.metrics.log(step, {"valid": {"bpc": bpc}, "seconds": progress.seconds})
            if self.accelerator.is_main_process:
                self.bar.write(f"step {step}: valid BPC {bpc:.4f}{_at_k(config.eval_k())}")
            if progress.best_bpc is None or bpc < progress.best_bpc:
                progress.best_step, progress.best_bpc = step, bpc
        stopping = self.stop.requested(self.accelerator)
        if evaluate_now or stopping or step % (config.save_interval or config.eval_interval) == 0:
            save()
            self._new_interval()
        return stopping

    def finish(self, stopped_at: int | None = None) -> None:
        """After the last step of this process. Raises Stopped when a signal ended it early."""
        self.bar.close()
        self.metrics.close()
        self.stop.release()
        if stopped_at is not None:
            leave()
            message = f"stopped by a signal after step {stopped_at}; a checkpoint is written, --resume goes on from it"
            raise Stopped(message if self.accelerator.is_main_process else "")

    def _new_interval(self) -> None:
        self._interval_start, self._interval_tokens = time.perf_counter(), 0

    def _log(self, step: int, loss: MethodLoss, k: int | None, learning_rate: float, norm: Tensor) -> None:
        progress = self.progress
        total = self.accelerator.reduce(progress.nats.to(self.accelerator.device), "sum")
        tokens_per_second = self._interval_tokens / (time.perf_counter() - self._interval_start)
        line = {"loss": (total[0] / total[1]).item(), "lr": learning_rate, "grad_norm": float(norm)}
        line |= {"bpc": line["loss"] / math.log(2), "k": k, "tokens_per_second": tokens_per_second}
        line |= {name: part.item() for name, part in loss.parts.items()}
        self.metrics.log(step, {"train": line, "seconds": progress.seconds})
        self.bar.set_postfix_str(f"BPC {line['bpc']:.3f}{_at_k(k)}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        progress.nats.zero_()
        self._new_interval()


def _at_k(k: int | None) -> str:
    return "" if k is None else f" at k = {k}"
