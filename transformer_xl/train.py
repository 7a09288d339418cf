"""Trains a Transformer-XL on enwik8 with any method of Table 1, then sweeps over the number of activated experts.

    python -m transformer_xl.train --method smoe_dropout --scale cpu --data data/enwik8 --run_dir runs/mine
    torchrun --nproc_per_node 8 -m transformer_xl.train --method smoe_dropout --scale paper --run_dir runs/paper
    python -m transformer_xl.train ... --resume          # goes on, bit for bit, where the last checkpoint was

Every field of ``transformer_xl.config.TrainConfig`` is a flag. The run folder is described in ``smoe.run.folder``.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from smoe import set_top_k
from smoe.errors import run_main
from smoe.flops import transformer_xl_flops, transformer_xl_step_flops
from smoe.parallel import check_agreement, clip_grad_norm_
from smoe.run.checkpoint import load_checkpoint
from smoe.run.launch import join, keep_from_ddp, leave, run_trainer, spread, together
from smoe.run.record import environment_record, parameter_counts
from smoe.run.result import flops_per_k, run_result, sweep
from smoe.run.resume import latest_checkpoint, load_whole, restore_progress, restore_run, save_run
from smoe.run.training import TrainingRun, open_run, print_header
from transformer_xl.config import CONFIG_DIR, TrainConfig
from transformer_xl.data import SegmentStream, dataset_record, evaluation_segments, load_split
from transformer_xl.evaluate import evaluate


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from the full rate to 0 at ``config.steps``."""
    warmup = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    return config.learning_rate * warmup * (1 + math.cos(math.pi * step / config.steps)) / 2


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs ``config`` to its end and returns what result.json holds."""
    environment = environment_record()  # now: the checkout may move on while this runs
    on_cpu = not torch.cuda.is_available()
    # Recorded as what it came to, so that a resume on another machine computes with the same numbers or says why not.
    with together():
        config = config.resolved(torch.device("cpu" if on_cpu else "cuda"))
    groups = join(config)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        # Fixed routers are the only buffers, equal everywhere by their seed. Sending them at every pass would change
        # them in place between THOR's two passes.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    device, rank, world_size, is_main = accelerator.device, groups.rank, groups.world_size, groups.is_main

    with together():
        # The data first: what is wrong with it should be said before anything is written.
        splits = {name: load_split(config.data, name) for name in ("train", "valid", "test")}
        dataset = dataset_record(config.data)
        stream = SegmentStream(splits["train"], config.batch_size, config.tgt_len, rank, world_size)
        for name in ("valid", "test"):
            evaluation_segments(
                splits[name], config.eval_batch_size, config.eval_tgt_len, max_tokens=config.eval_tokens
            )
        # Then the model, which may be too large for this machine.
        torch.manual_seed(config.seed)
        bare_model = config.build_model()
    check_agreement({"data": dataset["sha256"]}, groups)
    folder, finished = open_run(config, is_main)
    if finished:
        leave()
        return folder.read_result()

    method, parameters = config.get_method(), parameter_counts(bare_model)["total"]
    spread(bare_model, config, groups, device, bare_model.layers)
    if config.fsdp:
        keep_from_ddp(accelerator)
    torch.manual_seed(config.seed + 1000 * rank)  # equal weights everywhere, different dropout
    optimizer = torch.optim.Adam(bare_model.parameters(), lr=config.learning_rate, fused=True)
    checkpoint = latest_checkpoint(folder, groups, own=("memory",))
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    run = TrainingRun(config, folder, accelerator, groups, tokens_per_step=config.batch_size * config.tgt_len)
    print_header(
        config,
        accelerator,
        name="Transformer-XL",
        parameters=parameters,
        shape=f"{config.batch_size} x {config.tgt_len} bytes",
        resumed_after=None if checkpoint is None else checkpoint.step,
    )

    step, memory, resumed = 0, None, checkpoint is not None
    if resumed:
        step = checkpoint.step
        restore_progress(run, checkpoint)
        restore_run(run, checkpoint, bare_model, optimizer.optimizer)
        memory = checkpoint.tensors["memory"].get("memory")  # (layers, all rows, positions, d_model)
        if memory is not None:
            memory = memory[:, stream.share].to(device)
        del checkpoint

    def measure(split: str, k: int | None) -> float:
        bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        total = {"rank": rank, "world_size": world_size, "reduce": lambda total: accelerator.reduce(total, "sum")}
        return evaluate(bare, config, splits[split], device, k=k, **total)

    def save() -> None:
        whole = {}
        if memory is not None and memory.numel() > 0:
            parts = accelerator.gather(memory.transpose(0, 1).contiguous())  # rows first, to be joined in order
            whole = {"memory": parts.transpose(0, 1)}
        save_run(run, step, bare_model, optimizer.optimizer, tensors={"memory": whole})

    run.begin(step, resumed)
    model.train()
    stopped = False
    while step < config.steps and not stopped:
        run.begin_step()
        k = config.k_at(step)
        if k is not None:
            set_top_k(bare_model, k)
        learning_rate = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        inputs, targets, starts_epoch = stream.segment(step)
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if starts_epoch:
            memory = None
        loss = method.loss(
            bare_model,
            lambda: model(inputs, targets, memory, config.mem_len),  # noqa: B023 (called at once)
            balance_weight=config.balance_weight,
            consistency_weight=config.consistency_weight,
        )
        accelerator.backward(loss.total)
        norm = clip_grad_norm_(bare_model, config.clip, groups)
        run.check_finite(loss.total, norm, step, k, stream.where(step))
        optimizer.step()
        optimizer.zero_grad()
        memory = loss.output.memory
        step += 1
        stopped = run.end_step(
            step,
            loss,
            k=k,
            learning_rate=learning_rate,
            norm=norm,
            measure=lambda k: measure("valid", k),
            save=save,
        )
    run.finish(stopped_at=step if stopped else None)

    # ---- the sweep over k, from the best checkpoint ---------------------------------------------------------------
    best_path = folder.checkpoints / f"step-{run.progress.best_step:08d}"
    load_whole(bare_model, load_checkpoint(best_path, groups=["model"]).tensors["model"], groups)
    started = time.perf_counter()
    bpc = sweep(config, measure, is_main)
    with torch.device("meta"):
        whole_model = config.build_model()
    result = run_result(
        config,
        whole_model,
        name="transformer_xl",
        dataset=dataset,
        bpc=bpc,
        best=run.progress.best,
        flops=_flops(config, whole_model),
        seconds=run.progress.seconds,
        sweep_seconds=time.perf_counter() - started,
        tokens_per_step=run.tokens_per_step,
        processes=world_size,
        environment=environment,
    )
    folder.write_result(result)
    leave()
    return result


def _flops(config: TrainConfig, model: nn.Module) -> dict[str, dict[str, int]]:
    evaluation = {"batch": config.eval_batch_size, "tgt_len": config.eval_tgt_len, "mem_len": config.eval_mem_len}
    training = {"batch": config.batch_size, "tgt_len": config.tgt_len, "mem_len": config.mem_len}

    def one_pass(k: int | None) -> tuple[int, int]:
        counted = transformer_xl_flops(model, k, **evaluation)
        return counted["paper"], counted["true"]

    return flops_per_k(config, one_pass, lambda k: transformer_xl_step_flops(model, config.method, k, **training))


def main() -> None:
    run_trainer(TrainConfig, CONFIG_DIR, train, prog="python -m transformer_xl.train")


if __name__ == "__main__":
    run_main(main)
