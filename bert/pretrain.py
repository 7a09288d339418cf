"""Pretrains a BERT or RoBERTa by masked language modelling with any method of Table 1, then sweeps over k.

    python -m bert.pretrain --model bert --method smoe_dropout --scale cpu --data DIR --run_dir runs/mine
    torchrun --nproc_per_node 8 -m bert.pretrain --model roberta --method smoe_dropout --scale paper --run_dir runs/big
    python -m bert.pretrain ... --resume          # goes on, bit for bit, where the last checkpoint was

Every field of ``bert.config.PretrainConfig`` is a flag. The run folder is described in ``smoe.run.folder``; the
vocabulary, tokenizer.json, is put there too.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from bert.callback import RunCallback
from bert.config import CONFIG_DIR, PretrainConfig
from bert.data import Blocks, TrainingBatches
from bert.model import MaskedLM, build_model
from smoe.errors import run_main
from smoe.flops import count, count_step
from smoe.hf import TopKCallback
from smoe.methods import MethodLoss
from smoe.parallel import check_agreement
from smoe.run.checkpoint import load_checkpoint
from smoe.run.launch import join, keep_from_ddp, leave, run_trainer, spread, together
from smoe.run.record import environment_record, parameter_counts
from smoe.run.result import flops_per_k, run_result, sweep
from smoe.run.resume import latest_checkpoint, load_whole
from smoe.run.training import TrainingRun, open_run, print_header


class MaskedLMTrainer(Trainer):
    """`transformers.Trainer` with the method's whole loss, on batches that follow from the step."""

    def __init__(self, config: PretrainConfig, batches: TrainingBatches, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, self.batches = config, batches
        self.loss: MethodLoss | None = None  # of the last forward pass
        if config.fsdp:
            keep_from_ddp(self.accelerator)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def get_train_dataloader(self) -> _Steps:
        return _Steps(self)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Everything the method minimises. `model` may be wrapped for several processes; its layers are read bare."""
        loss = self.config.get_method().loss(
            self.model,
            lambda: model(**inputs),
            balance_weight=self.config.balance_weight,
            consistency_weight=self.config.consistency_weight,
        )
        self.loss = loss
        return (loss.total, loss.output) if return_outputs else loss.total


class _Steps:
    """This process's batches from the trainer's present step on. Not a `DataLoader`: that one draws random numbers."""

    def __init__(self, trainer: MaskedLMTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.trainer.state.global_step, self.trainer.config.steps):
            yield self.trainer.batches.batch(step)._asdict()


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Runs ``config`` to its end and returns what result.json holds."""
    environment = environment_record()  # now: the checkout may move on while this runs
    transformers_logging.set_verbosity_error()
    on_cpu = not torch.cuda.is_available()
    # Recorded as what it came to, so that a resume on another machine computes with the same numbers or says why not.
    with together():
        config = config.resolved(torch.device("cpu" if on_cpu else "cuda"))
    groups = join(config)
    arguments = _arguments(config, on_cpu)

    with together():
        # The data first: what is wrong with it should be said before anything is written.
        blocks = Blocks(config.data, config.model)
        train = {name: blocks.sequences(name, config.seq_len) for name in ("train", "valid", "test")}["train"]
        batches = TrainingBatches(
            train,
            blocks.vocabulary,
            config.batch_size,
            config.mask_share,
            config.seed,
            groups.rank,
            groups.world_size,
        )
        # Then the model, which may be too large for this machine.
        torch.manual_seed(config.seed)
        model = MaskedLM(build_model(config, blocks.vocabulary))
    check_agreement({"data": blocks.record["splits"], "tokenizer": blocks.record["tokenizer"]}, groups)
    folder, finished = open_run(config, groups.is_main)
    if finished:
        leave()
        return folder.read_result()
    if groups.is_main:
        shutil.copyfile(blocks.folder / "tokenizer.json", folder.path / "tokenizer.json")

    parameters = parameter_counts(model)["total"]
    spread(model, config, groups, arguments.device, model.model.base_model.encoder.layer)
    callbacks: list[TrainerCallback] = []
    if config.get_method().routed:
        k_min, k_max, mode = config.k_schedule()
        callbacks = [TopKCallback(k_min, k_max, mode, seed=config.seed)]
    trainer = MaskedLMTrainer(config, batches, model=model, args=arguments, callbacks=callbacks)
    checkpoint = latest_checkpoint(folder, groups)
    run = TrainingRun(config, folder, trainer.accelerator, groups, tokens_per_step=config.batch_size * config.seq_len)
    callback = RunCallback(trainer, blocks, run, checkpoint)
    trainer.add_callback(callback)
    note = f" ({blocks.meta['note']})" if blocks.meta["note"] else ""
    print_header(
        config,
        trainer.accelerator,
        name=config.model,
        parameters=parameters,
        shape=f"{config.batch_size} x {config.seq_len} tokens",
        lines=[f"data: {blocks.meta['dataset']}{note}, vocabulary of {blocks.vocabulary.size}"],
        resumed_after=None if checkpoint is None else checkpoint.step,
    )
    if checkpoint is None or checkpoint.step < config.steps:
        trainer.train()
        run.finish(callback.stopped_at)

    # ---- the sweep over k, from the best checkpoint ---------------------------------------------------------------
    best_path = folder.checkpoints / f"step-{run.progress.best_step:08d}"
    load_whole(model.model, load_checkpoint(best_path, groups=["model"]).tensors["model"], groups)
    started = time.perf_counter()
    bpc = sweep(config, callback.measure, groups.is_main)
    with torch.device("meta"):
        whole_model = MaskedLM(build_model(config, blocks.vocabulary))
    result = run_result(
        config,
        whole_model,
        name=config.model,
        dataset=blocks.record,
        bpc=bpc,
        best=run.progress.best,
        flops=_flops(config, whole_model),
        seconds=run.progress.seconds,
        sweep_seconds=time.perf_counter() - started,
        tokens_per_step=run.tokens_per_step,
        processes=groups.world_size,
        environment=environment,
    )
    folder.write_result(result)
    leave()
    return result


def _arguments(config: PretrainConfig, on_cpu: bool) -> TrainingArguments:
    """Trainer's settings; what the run folder does itself (logs, checkpoints, evaluation) is off."""
    arguments = TrainingArguments(
        output_dir=config.run_dir,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=0,  # the callback clips
        optim="adamw_torch_fused",
        bf16=config.precision == "bf16",
        use_cpu=on_cpu,
        seed=config.seed,
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None,
        ddp_find_unused_parameters=False,
        # Fixed routers are the only buffers that matter, equal everywhere by their seed. Sending them at every pass
        # would change them in place between THOR's two passes.
        ddp_broadcast_buffers=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    if arguments.n_gpu > 1:  # several GPUs in one process: torchrun is the way to use them
        arguments._n_gpu = 1
    arguments.per_device_train_batch_size = max(config.batch_size // arguments.world_size, 1)
    return arguments


def _flops(config: PretrainConfig, model: MaskedLM) -> dict[str, dict[str, int]]:
    def ids(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    masked = max(round(config.mask_share * config.seq_len), 1)
    inputs = {"input_ids": ids(config.batch_size, config.seq_len)}
    inputs |= {name: ids(config.batch_size, masked) for name in ("positions", "targets")}

    def one_pass(k: int | None) -> tuple[int, int]:
        counted = count(model.model, {"input_ids": ids(config.eval_batch_size, config.seq_len)}, k)
        return counted.paper_linear, counted.true

    return flops_per_k(config, one_pass, lambda k: count_step(model, config.method, inputs, k))


def main() -> None:
    run_trainer(PretrainConfig, CONFIG_DIR, pretrain, prog="python -m bert.pretrain")


if __name__ == "__main__":
    run_main(main)
