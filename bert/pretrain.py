"""Pretrains a BERT or RoBERTa by masked language modelling with any method of Table 1, then sweeps over k.

    python -m bert.pretrain --model bert --method smoe_dropout --scale cpu --data DIR --run_dir runs/mine
    torchrun --nproc_per_node 8 -m bert.pretrain --model roberta --method smoe_dropout --scale paper --run_dir runs/big
    python -m bert.pretrain ... --resume          # goes on, bit for bit, where the last checkpoint was

Every field of ``bert.config.PretrainConfig`` is a flag. The run folder is described in ``smoe.run.folder``; the
vocabulary, tokenizer.json, is put there too.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from bert.callback import RunCallback
from bert.config import CONFIG_DIR, PretrainConfig
from bert.data import Blocks, TrainingBatches
from bert.evaluate import k_name, precision
from bert.model import MaskedLM, build_model
from smoe.flops import count, count_step
from smoe.hf import TopKCallback
from smoe.run.checkpoint import Checkpoint, load_checkpoint, load_latest
from smoe.run.config import parse_config, to_dict
from smoe.run.errors import RunError, run_main
from smoe.run.folder import RunFolder
from smoe.run.record import active_per_k, environment_record, parameter_counts

# What may differ when a run is resumed: where things are and how often they are said, nothing that changes numbers.
MAY_CHANGE = ("data", "scale", "save_interval", "log_interval", "progress")


class MaskedLMTrainer(Trainer):
    """`transformers.Trainer` with the method's whole loss, on batches that follow from the step."""

    def __init__(self, config: PretrainConfig, batches: TrainingBatches, run: RunCallback, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, self.batches, self.run = config, batches, run
        run.accelerator = self.accelerator
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
        self.run.loss = loss
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
    transformers_logging.set_verbosity_error()
    # The data first: what is wrong with it should be said before anything is written.
    blocks = Blocks(config.data, config.model)
    splits = {name: blocks.sequences(name, config.seq_len) for name in ("train", "valid", "test")}
    on_cpu = not torch.cuda.is_available()
    bf16 = precision(config, torch.device("cpu" if on_cpu else "cuda")) == "bf16"
    arguments = _arguments(config, bf16, on_cpu)
    rank, world_size, is_main = arguments.process_index, arguments.world_size, arguments.process_index == 0
    batches = TrainingBatches(
        splits["train"], blocks.vocabulary, config.batch_size, config.mask_share, config.seed, rank, world_size
    )
    folder = RunFolder.open(
        config.run_dir, to_dict(config), resume=config.resume, may_change=MAY_CHANGE, is_main=is_main
    )
    if is_main:
        shutil.copyfile(blocks.folder / "tokenizer.json", folder.path / "tokenizer.json")
    _wait_for_everyone(world_size)
    if config.resume and folder.result_path.exists():
        if is_main:
            print(f"{config.run_dir} is finished; its result is in {folder.result_path}")
        return folder.read_result()

    checkpoint = load_latest(folder.checkpoints, groups=["model", "optimizer", f"rng-rank{rank}"], clean=is_main)
    torch.manual_seed(config.seed)
    model = MaskedLM(build_model(config, blocks.vocabulary))
    if checkpoint is not None:
        _check(checkpoint, rank, is_main)
        model.model.load_state_dict(checkpoint.tensors["model"])
    run = RunCallback(config, blocks, folder, checkpoint)
    callbacks = [run]
    if config.get_method().routed:
        k_min, k_max, mode = config.k_schedule()
        callbacks = [TopKCallback(k_min, k_max, mode, seed=config.seed), run]
    trainer = MaskedLMTrainer(config, batches, run, model=model, args=arguments, callbacks=callbacks)
    if is_main:
        _print_header(config, trainer, blocks, bf16, checkpoint)
    if checkpoint is None or checkpoint.step < config.steps:
        trainer.train()
    if run.stopped_at is not None:
        raise RunError(
            f"stopped by a signal after step {run.stopped_at}; a checkpoint is written, --resume goes on from it"
        )

    # ---- the sweep over k, from the best checkpoint ---------------------------------------------------------------
    best_path = folder.checkpoints / f"step-{run.best['best_step']:08d}"
    model.model.load_state_dict(load_checkpoint(best_path, groups=["model"]).tensors["model"])
    started = time.perf_counter()
    bpc: dict[str, dict[str, float]] = {"valid": {}, "test": {}}
    for k in config.sweep_ks():
        for split in bpc:
            bpc[split][k_name(k)] = run.measure(model, splits[split], k)
        if is_main:
            figures = ", ".join(f"{split} {bpc[split][k_name(k)]:.4f}" for split in bpc)
            print(f"k = {k_name(k):>5}: BPC {figures}", flush=True)
    result = _result(config, model, blocks, bpc, run, world_size, bf16, time.perf_counter() - started)
    folder.write_result(result)
    _wait_for_everyone(world_size)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result


def _arguments(config: PretrainConfig, bf16: bool, on_cpu: bool) -> TrainingArguments:
    """Trainer's settings; what the run folder does itself (logs, checkpoints, evaluation) is off."""
    arguments = TrainingArguments(
        output_dir=config.run_dir,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.clip,
        optim="adamw_torch_fused",
        bf16=bf16,
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


def _wait_for_everyone(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()


def _check(checkpoint: Checkpoint, rank: int, is_main: bool) -> None:
    for path, reason in checkpoint.skipped if is_main else ():
        print(f"warning: {path.name} is damaged ({reason}); going on from {checkpoint.path.name}", file=sys.stderr)
    if f"rng-rank{rank}" not in checkpoint.tensors:
        saved = checkpoint.state["world_size"]
        raise ValueError(f"the checkpoint is of {saved} processes; resume with as many, so that each finds its state")


def _print_header(
    config: PretrainConfig, trainer: Trainer, blocks: Blocks, bf16: bool, checkpoint: Checkpoint | None
) -> None:
    method, total = config.get_method(), parameter_counts(trainer.model)["total"]
    schedule = ""
    if method.routed:
        k_min, k_max, mode = config.k_schedule()
        schedule = f", {config.num_experts} experts, k = {k_min}..{k_max} ({mode})"
    print(f"{config.model}, {method.title}{schedule}, seed {config.seed}, run folder {config.run_dir}")
    reason = f" ({config.scale_reason})" if config.scale_reason else ""
    print(
        f"scale {config.scale}{reason}: {total / 1e6:.1f} M parameters, {config.steps} steps of {config.batch_size} x "
        f"{config.seq_len} tokens, {trainer.accelerator.num_processes} x {trainer.accelerator.device.type}, "
        f"precision {'bf16' if bf16 else 'fp32'}"
    )
    note = f" ({blocks.meta['note']})" if blocks.meta["note"] else ""
    print(f"data: {blocks.meta['dataset']}{note}, vocabulary of {blocks.vocabulary.size}")
    if checkpoint is not None:
        print(f"resumed after step {checkpoint.step}")
    sys.stdout.flush()


def _result(
    config: PretrainConfig,
    model: MaskedLM,
    blocks: Blocks,
    bpc: dict[str, dict[str, float]],
    run: RunCallback,
    world_size: int,
    bf16: bool,
    sweep_seconds: float,
) -> dict[str, Any]:
    tokens = config.batch_size * config.seq_len
    counts: dict[str, Any] = parameter_counts(model)
    counts["active_per_k"] = active_per_k(model, [k for k in config.sweep_ks() if k is not None])
    return {
        "model": config.model,
        "method": config.method,
        **_label(config),
        "scale": config.scale,
        "seed": config.seed,
        "dataset": blocks.record,
        "bpc": bpc,
        "eval_sequences": config.eval_sequences,
        "best": run.best,
        "parameters": counts,
        "flops": _flops(config, model),
        "seconds": {"training": run.seconds, "sweep": sweep_seconds, "per_step": run.seconds / config.steps},
        "tokens_per_step": tokens,
        "tokens_per_second": tokens * config.steps / run.seconds,
        "processes": world_size,
        "precision": "bf16" if bf16 else "fp32",
        "config": to_dict(config),
        "environment": environment_record(),
    }


def _label(config: PretrainConfig) -> dict[str, str]:
    """A name for a run that departs from its method (an ablation), to tell it from the method's own in tables."""
    names = ("router", "score", "output_scale", "schedule", "k_min", "k_max", "balance_weight", "consistency_weight")
    defaults = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    changed = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) != defaults[name]]
    return {"label": ", ".join([config.get_method().title, *changed])} if changed else {}


def _flops(config: PretrainConfig, model: MaskedLM) -> dict[str, dict[str, int]]:
    """By k: one pass of the whole model by the paper's count and the true one, and one training step."""

    def ids(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    masked = max(round(config.mask_share * config.seq_len), 1)
    inputs = {"input_ids": ids(config.batch_size, config.seq_len)}
    inputs |= {name: ids(config.batch_size, masked) for name in ("positions", "targets")}
    flops = {}
    for k in config.sweep_ks():
        counted = count(model.model, {"input_ids": ids(config.eval_batch_size, config.seq_len)}, k)
        step = count_step(model, config.method, inputs, k)
        flops[k_name(k)] = {"paper": counted.paper_linear, "true": counted.true, "training_step": step}
    return flops


def main() -> None:
    pretrain(parse_config(PretrainConfig, CONFIG_DIR, prog="python -m bert.pretrain"))


if __name__ == "__main__":
    run_main(main)
