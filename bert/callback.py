"""What a run needs besides `transformers.Trainer`'s own loop: exact resume, evaluation, metrics, checkpoints, signals.

Everything hangs on the callbacks that Trainer documents; none of its inner methods is replaced.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from bert.config import PretrainConfig
from bert.data import Blocks
from bert.evaluate import evaluate, k_name
from bert.model import MaskedLM
from smoe import smoe_layers
from smoe.methods import MethodLoss
from smoe.run.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    flatten_optimizer,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)
from smoe.run.errors import RunError
from smoe.run.folder import RunFolder
from smoe.run.metrics import MetricsLogger


class NonFiniteError(RunError):
    """The loss or its gradient is no longer a finite number."""


class RunCallback(TrainerCallback):
    """Keeps the run folder, and puts a resumed run back where its checkpoint was, bit for bit.

    Trainer starts at step 0 whatever happens; before its first step this sets its state to the checkpoint's step and
    restores optimizer, learning rate and generators. The data follow the step, and so does k (`TopKCallback`).
    """

    def __init__(
        self, config: PretrainConfig, blocks: Blocks, folder: RunFolder, checkpoint: Checkpoint | None = None
    ) -> None:
        self.config, self.blocks, self.folder, self.checkpoint = config, blocks, folder, checkpoint
        self.valid = blocks.sequences("valid", config.seq_len)
        self.best: dict[str, Any] = {"best_step": None, "best_bpc": None}
        self.seconds = 0.0
        self.nats = torch.zeros(2, dtype=torch.float64)  # since the last line of metrics: task loss, steps
        self.stopped_at: int | None = None
        self.accelerator: Any = None  # set once there is a Trainer
        self.loss: MethodLoss | None = None  # of the step under way, set by compute_loss
        if checkpoint is not None:
            state = checkpoint.state
            self.best = {name: state[name] for name in self.best}
            self.seconds = state["seconds"]

    # ---- Trainer's events -----------------------------------------------------------------------------------------
    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        rank = self.accelerator.process_index
        self.stop = StopRequest()
        if self.checkpoint is None:
            torch.manual_seed(self.config.seed + 1000 * rank)  # equal weights everywhere, different dropout
        else:
            saved, tensors = self.checkpoint.state, self.checkpoint.tensors
            state.global_step = self.checkpoint.step
            restore_optimizer(
                _bare(optimizer), tensors["optimizer"], saved["optimizer"], model.model.named_parameters()
            )
            lr_scheduler.load_state_dict(saved["lr_scheduler"])
            if self.accelerator.is_main_process:
                self.nats = torch.tensor(saved["nats"], dtype=torch.float64)
            restore_rng(tensors[f"rng-rank{rank}"])
        step = state.global_step
        self.metrics = MetricsLogger(self.folder, resume_step=-1 if self.checkpoint is None else step)
        show = self.accelerator.is_main_process and self.config.progress
        self.bar = tqdm(total=self.config.steps, initial=step, desc=self.config.get_method().title, unit="step",
                        dynamic_ncols=True, disable=not show,
                        mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
        self.interval_start = time.perf_counter()

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.started = time.perf_counter()
        self.k = next((layer.top_k for _, layer in smoe_layers(model)), None)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Stops before the optimizer step when loss or gradient is not finite; every process decides alike."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).sum()  # clipping made NaN of all if one was not finite
        values = self.accelerator.gather(torch.stack([self.loss.total.detach().float(), norm.float()]).view(1, 2))
        if not values.isfinite().all():
            what = "the loss" if not values[:, 0].isfinite().all() else "the gradient"
            raise NonFiniteError(
                f"{what} is not finite at step {state.global_step + 1} (k = {k_name(self.k)}); stopped before the "
                f"optimizer step; checkpoints up to the last good one are in {self.folder.checkpoints}"
            )
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        config, step = self.config, state.global_step
        self.seconds += time.perf_counter() - self.started
        self.nats += torch.tensor([self.loss.task.item(), 1.0], dtype=torch.float64)
        if step % config.log_interval == 0 or step == config.steps:
            self._log(step)
        self.bar.update()
        evaluate_now = step % config.eval_interval == 0 or step == config.steps
        if evaluate_now:
            bpc = self.measure(model, self.valid, config.eval_k())
            self.metrics.log(step, {"valid": {"bpc": bpc}, "seconds": self.seconds})
            if self.accelerator.is_main_process:
                self.bar.write(f"step {step}: valid BPC {bpc:.4f} at k = {k_name(config.eval_k())}")
            if self.best["best_bpc"] is None or bpc < self.best["best_bpc"]:
                self.best = {"best_step": step, "best_bpc": bpc}
        stopping = self.stop.requested(self.accelerator)
        if evaluate_now or stopping or step % (config.save_interval or config.eval_interval) == 0:
            self._save(step, model, _bare(optimizer), lr_scheduler)
        if evaluate_now:
            self.interval_start = time.perf_counter()
        if stopping:
            self.stopped_at = step
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()
        self.metrics.close()
        self.stop.restore()

    # ---- what they do ---------------------------------------------------------------------------------------------
    def measure(self, model: MaskedLM, data: Any, k: int | None) -> float:
        """Bits per masked token of ``data``, over all processes."""
        accelerator = self.accelerator
        return evaluate(
            model,
            self.config,
            data,
            self.blocks.vocabulary,
            accelerator.device,
            k=k,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            reduce=lambda total: accelerator.reduce(total, "sum"),
        )

    def _sum(self) -> Tensor:
        return self.accelerator.reduce(self.nats.to(self.accelerator.device), "sum").cpu()

    def _log(self, step: int) -> None:
        config, total, now = self.config, self._sum(), time.perf_counter()
        tokens = self.nats[1].item() * config.batch_size * config.seq_len
        line = {"loss": (total[0] / total[1]).item(), "lr": self.learning_rate}
        line |= {"bpc": line["loss"] / math.log(2), "k": self.k}
        line["tokens_per_second"] = tokens / (now - self.interval_start)
        line |= {name: part.item() for name, part in self.loss.parts.items()}
        self.metrics.log(step, {"train": line, "seconds": self.seconds})
        self.bar.set_postfix_str(
            f"BPC {line['bpc']:.3f}, k {k_name(self.k)}, {line['tokens_per_second']:,.0f} tokens/s", refresh=False
        )
        self.nats.zero_()
        self.interval_start = now

    def _save(self, step: int, model: MaskedLM, optimizer: torch.optim.Optimizer, lr_scheduler: Any) -> None:
        """Writes one checkpoint: the main process model and optimizer, each process its generators."""
        accelerator, nats = self.accelerator, self._sum()
        writer, rank = CheckpointWriter(self.folder.checkpoints, step), accelerator.process_index
        if accelerator.is_main_process:
            writer.begin()
        accelerator.wait_for_everyone()
        writer.write(f"rng-rank{rank}", rng_tensors())
        if accelerator.is_main_process:
            tensors, plain = flatten_optimizer(optimizer, model.model.named_parameters())
            writer.write("model", model.model.state_dict())
            writer.write("optimizer", tensors)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = {
                "optimizer": plain,
                "lr_scheduler": lr_scheduler.state_dict(),
                "nats": nats.tolist(),
                "seconds": self.seconds,
                "world_size": accelerator.num_processes,
                "vocabulary": dataclasses.asdict(self.blocks.vocabulary),
                **self.best,
            }
            protect = [] if self.best["best_step"] is None else [self.best["best_step"]]
            writer.seal(state, keep=2, protect=protect)
        accelerator.wait_for_everyone()


class StopRequest:
    """SIGTERM and SIGINT ask for a checkpoint after the current step instead of ending the process at once."""

    def __init__(self) -> None:
        self._received = False
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def _on_signal(self, number: int, frame: object) -> None:
        self._received = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process

    def requested(self, accelerator: Any) -> bool:
        """Whether any process was asked; the same answer on all."""
        if accelerator.num_processes == 1:
            return self._received
        flag = torch.tensor(float(self._received), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the one that Accelerate wraps around it."""
    return getattr(optimizer, "optimizer", optimizer)
