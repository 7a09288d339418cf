"""What a run needs besides `transformers.Trainer`'s own loop: exact resume, clipping, evaluation, checkpoints, signals.

Everything hangs on the callbacks that Trainer documents; none of its inner methods is replaced.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from bert.data import Blocks
from bert.evaluate import evaluate
from bert.model import MaskedLM
from smoe import smoe_layers
from smoe.parallel import clip_grad_norm_
from smoe.run.checkpoint import Checkpoint
from smoe.run.resume import restore_progress, restore_run, save_run
from smoe.run.training import TrainingRun

if TYPE_CHECKING:
    from bert.pretrain import MaskedLMTrainer


class RunCallback(TrainerCallback):
    """Keeps the run folder, and puts a resumed run back where its checkpoint was, bit for bit.

    Trainer starts at step 0 whatever happens; before its first step this sets its state to the checkpoint's step and
    restores optimizer, learning rate and generators. The data follow the step, and so does k (`TopKCallback`).
    """

    def __init__(
        self, trainer: MaskedLMTrainer, blocks: Blocks, run: TrainingRun, checkpoint: Checkpoint | None
    ) -> None:
        self.trainer, self.blocks, self.run, self.checkpoint = trainer, blocks, run, checkpoint
        self.config = trainer.config
        self.stopped_at: int | None = None
        if checkpoint is not None:
            restore_progress(run, checkpoint)

    # ---- Trainer's events -----------------------------------------------------------------------------------------
    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        checkpoint = self.checkpoint
        if checkpoint is None:
            # equal weights everywhere, different dropout
            torch.manual_seed(self.config.seed + 1000 * self.run.groups.rank)
        else:
            state.global_step = checkpoint.step
            restore_run(self.run, checkpoint, model.model, _bare(optimizer))
            # One entry a group of parameters, all the same; how many groups there are depends on how they are spread.
            groups, saved = len(optimizer.param_groups), checkpoint.state["lr_scheduler"]
            lr_scheduler.load_state_dict(
                {name: value[:1] * groups if isinstance(value, list) else value for name, value in saved.items()}
            )
            checkpoint.tensors.clear()  # they are the model's and the optimizer's now
        self.run.begin(state.global_step, resumed=checkpoint is not None)

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.run.begin_step()
        self.k = next((layer.top_k for _, layer in smoe_layers(model)), None)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        step = state.global_step
        self.norm = clip_grad_norm_(model, self.config.clip, self.run.groups)
        self.run.check_finite(self.trainer.loss.total, self.norm, step, self.k, self.trainer.batches.where(step))
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        step = state.global_step
        stopping = self.run.end_step(
            step,
            self.trainer.loss,
            k=self.k,
            learning_rate=self.learning_rate,
            norm=self.norm,
            measure=lambda k: self.measure("valid", k),
            save=lambda: self._save(step, model, _bare(optimizer), lr_scheduler),
        )
        if stopping:
            self.stopped_at = step
            control.should_training_stop = True

    # ---- what they do ---------------------------------------------------------------------------------------------
    def measure(self, split: str, k: int | None) -> float:
        """Bits per masked token of ``split``, over all processes."""
        accelerator, groups = self.run.accelerator, self.run.groups
        return evaluate(
            self.trainer.model,
            self.config,
            self.blocks.sequences(split, self.config.seq_len),
            self.blocks.vocabulary,
            accelerator.device,
            k=k,
            rank=groups.rank,
            world_size=groups.world_size,
            reduce=lambda total: accelerator.reduce(total, "sum"),
        )

    def _save(self, step: int, model: MaskedLM, optimizer: torch.optim.Optimizer, lr_scheduler: Any) -> None:
        state = {
            "lr_scheduler": lr_scheduler.state_dict(),
            "vocabulary": dataclasses.asdict(self.blocks.vocabulary),
        }
        save_run(self.run, step, model.model, optimizer, state=state)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the one that Accelerate wraps around it."""
    return getattr(optimizer, "optimizer", optimizer)
