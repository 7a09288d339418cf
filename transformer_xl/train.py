"""Trains a Transformer-XL on enwik8 with any method of Table 1, then sweeps over the number of activated experts.

    python -m transformer_xl.train --method smoe_dropout --scale cpu --data data/enwik8 --run_dir runs/mine
    torchrun --nproc_per_node 8 -m transformer_xl.train --method smoe_dropout --scale paper --run_dir runs/paper
    python -m transformer_xl.train ... --resume          # goes on, bit for bit, where the last checkpoint was

Every field of ``transformer_xl.config.TrainConfig`` is a flag. The run folder is described in ``smoe.run.folder``.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from smoe import set_top_k
from smoe.flops import transformer_xl_flops, transformer_xl_step_flops
from smoe.run.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    flatten_optimizer,
    load_checkpoint,
    load_latest,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)
from smoe.run.config import parse_config, to_dict
from smoe.run.errors import RunError, run_main
from smoe.run.folder import RunFolder
from smoe.run.metrics import MetricsLogger
from smoe.run.record import active_per_k, environment_record, parameter_counts
from transformer_xl.config import CONFIG_DIR, TrainConfig
from transformer_xl.data import SegmentStream, dataset_record, evaluation_segments, load_split
from transformer_xl.evaluate import evaluate, k_name, precision

# What may differ when a run is resumed: where things are and how often they are said, nothing that changes numbers.
MAY_CHANGE = ("data", "scale", "save_interval", "log_interval", "progress")


PLACES = ("run_dir", "data", "resume", "progress")


class NonFiniteError(RunError):
    """The loss or its gradient is no longer a finite number."""


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from the full rate to 0 at ``config.steps``."""
    warmup = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    return config.learning_rate * warmup * (1 + math.cos(math.pi * step / config.steps)) / 2


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs ``config`` to its end and returns what result.json holds."""
    torch.manual_seed(config.seed)
    on_cpu = not torch.cuda.is_available()
    # Recorded as what it came to, so that a resume on another machine computes with the same numbers or says why not.
    config = dataclasses.replace(config, precision=precision(config, torch.device("cpu" if on_cpu else "cuda")))
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        # Fixed routers are the only buffers, equal everywhere by their seed. Sending them at every pass would change
        # them in place between THOR's two passes.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    is_main = accelerator.is_main_process
    environment = environment_record()  # now: the checkout may move on while this runs

    # The data first: what is wrong with it should be said before anything is written.
    splits = {name: load_split(config.data, name) for name in ("train", "valid", "test")}
    dataset = dataset_record(config.data)
    stream = SegmentStream(splits["train"], config.batch_size, config.tgt_len, rank, world_size)
    for name in ("valid", "test"):
        evaluation_segments(splits[name], config.eval_batch_size, config.eval_tgt_len, max_tokens=config.eval_tokens)
    # Then the model, which may be too large for this machine.
    bare_model = config.build_model()
    folder = RunFolder.open(
        config.run_dir, to_dict(config), resume=config.resume, may_change=MAY_CHANGE, is_main=is_main
    )
    accelerator.wait_for_everyone()
    if config.resume and folder.result_path.exists():
        if is_main:
            print(f"{config.run_dir} is finished; its result is in {folder.result_path}")
        return folder.read_result()

    method = config.get_method()
    torch.manual_seed(config.seed + 1000 * rank)  # equal weights everywhere, different dropout
    optimizer = torch.optim.Adam(bare_model.parameters(), lr=config.learning_rate, fused=True)
    checkpoint = load_latest(folder.checkpoints, groups=_groups(rank), clean=is_main)
    model, optimizer = accelerator.prepare(bare_model, optimizer)

    step, memory = 0, None
    # seconds of training; best so far; nats and steps since the last line of metrics
    progress = {"seconds": 0.0, "best_step": None, "best_bpc": None, "nats": [0.0, 0.0]}
    if checkpoint is not None:
        step, memory, progress = _restore(checkpoint, bare_model, optimizer.optimizer, accelerator)
    metrics = MetricsLogger(folder, resume_step=step if checkpoint is not None else -1)
    stop = _StopRequest()
    if is_main:
        _print_header(config, accelerator, bare_model, step)

    # ---- training -------------------------------------------------------------------------------------------------
    model.train()
    bar = tqdm(total=config.steps, initial=step, desc=method.title, unit="step", dynamic_ncols=True,
               disable=not (is_main and config.progress), mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    interval_start, interval_tokens = time.perf_counter(), 0
    while step < config.steps:
        started = time.perf_counter()
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
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
        _check_finite(accelerator, loss.total, norm, step, stream, k, folder)
        optimizer.step()
        optimizer.zero_grad()
        memory = loss.output.memory
        step += 1
        progress["nats"] = [progress["nats"][0] + loss.task.item(), progress["nats"][1] + 1]
        progress["seconds"] += time.perf_counter() - started
        interval_tokens += config.batch_size * config.tgt_len

        if step % config.log_interval == 0 or step == config.steps:
            total = accelerator.reduce(torch.tensor(progress["nats"], dtype=torch.float64, device=device), "sum")
            tokens_per_second = interval_tokens / (time.perf_counter() - interval_start)
            line = {"loss": (total[0] / total[1]).item(), "lr": learning_rate, "grad_norm": float(norm)}
            line |= {"bpc": line["loss"] / math.log(2), "k": k, "tokens_per_second": tokens_per_second}
            line |= {name: part.item() for name, part in loss.parts.items()}
            metrics.log(step, {"train": line, "seconds": progress["seconds"]})
            bar.set_postfix_str(
                f"BPC {line['bpc']:.3f}{_at_k(k)}, {line['tokens_per_second']:,.0f} tokens/s", refresh=False
            )
            progress["nats"] = [0.0, 0.0]
            interval_start, interval_tokens = time.perf_counter(), 0
        bar.update()

        evaluate_now = step % config.eval_interval == 0 or step == config.steps
        if evaluate_now:
            bpc = _evaluate(model, config, splits["valid"], accelerator, config.eval_k())
            metrics.log(step, {"valid": {"bpc": bpc}, "seconds": progress["seconds"]})
            if is_main:
                bar.write(f"step {step}: valid BPC {bpc:.4f}{_at_k(config.eval_k())}")
            if progress["best_bpc"] is None or bpc < progress["best_bpc"]:
                progress |= {"best_step": step, "best_bpc": bpc}
        stopping = stop.requested(accelerator)
        if evaluate_now or stopping or step % (config.save_interval or config.eval_interval) == 0:
            _save(folder, step, accelerator, bare_model, optimizer.optimizer, memory, progress)
            interval_start, interval_tokens = time.perf_counter(), 0
        if stopping:
            bar.close()
            raise RunError(f"stopped by a signal after step {step}; a checkpoint is written, --resume goes on from it")
    bar.close()
    stop.release()

    # ---- the sweep over k, from the best checkpoint ---------------------------------------------------------------
    best_path = folder.checkpoints / f"step-{progress['best_step']:08d}"
    bare_model.load_state_dict(load_checkpoint(best_path, groups=["model"]).tensors["model"])
    started = time.perf_counter()
    bpc = {"valid": {}, "test": {}}
    for k in config.sweep_ks():
        for split in bpc:
            bpc[split][k_name(k)] = _evaluate(model, config, splits[split], accelerator, k)
        if is_main:
            figures = ", ".join(f"{split} {bpc[split][k_name(k)]:.4f}" for split in bpc)
            print(f"{'dense' if k is None else f'k = {k:2}'}: BPC {figures}", flush=True)
    metrics.close()
    result = _result(config, bare_model, accelerator, dataset, bpc, progress, time.perf_counter() - started)
    result["environment"] = environment
    folder.write_result(result)
    accelerator.end_training()
    return result


def _groups(rank: int) -> list[str]:
    return ["model", "optimizer", f"memory-rank{rank}", f"rng-rank{rank}"]


def _save(
    folder: RunFolder,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    memory: Tensor | None,
    progress: dict[str, Any],
) -> None:
    """Writes one checkpoint: the main process model and optimizer, each process its memory and generators."""
    writer, rank = CheckpointWriter(folder.checkpoints, step), accelerator.process_index
    if accelerator.is_main_process:
        writer.begin()
    accelerator.wait_for_everyone()
    own = {"nats": torch.tensor(progress["nats"], dtype=torch.float64)}
    writer.write(f"memory-rank{rank}", own if memory is None else {"memory": memory, **own})
    writer.write(f"rng-rank{rank}", rng_tensors())
    if accelerator.is_main_process:
        tensors, plain = flatten_optimizer(optimizer, model.named_parameters())
        writer.write("model", model.state_dict())
        writer.write("optimizer", tensors)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"optimizer": plain, "world_size": accelerator.num_processes, **progress}
        del state["nats"]  # each process keeps its own
        protect = [] if progress["best_step"] is None else [progress["best_step"]]
        writer.seal(state, keep=2, protect=protect)
    accelerator.wait_for_everyone()


def _restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> tuple[int, Tensor | None, dict[str, Any]]:
    for path, reason in checkpoint.skipped if accelerator.is_main_process else ():
        print(f"warning: {path.name} is damaged ({reason}); going on from {checkpoint.path.name}", file=sys.stderr)
    state, tensors = checkpoint.state, checkpoint.tensors
    rank, saved, here = accelerator.process_index, state["world_size"], accelerator.num_processes
    if saved != here:
        raise ValueError(f"processes: {here}, but the checkpoint is of {saved}; resume with as many, each has a memory")
    model.load_state_dict(tensors["model"])
    restore_optimizer(optimizer, tensors["optimizer"], state["optimizer"], model.named_parameters())
    restore_rng(tensors[f"rng-rank{rank}"])
    own = tensors[f"memory-rank{rank}"]
    memory = own.get("memory")
    progress = {name: state[name] for name in ("seconds", "best_step", "best_bpc")} | {"nats": own["nats"].tolist()}
    return checkpoint.step, None if memory is None else memory.to(accelerator.device), progress


def _evaluate(model: nn.Module, config: TrainConfig, data: Any, accelerator: Accelerator, k: int | None) -> float:
    bare_model = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    return evaluate(
        bare_model,
        config,
        data,
        accelerator.device,
        k=k,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        reduce=lambda total: accelerator.reduce(total, "sum"),
    )


def _check_finite(
    accelerator: Accelerator,
    loss: Tensor,
    norm: Tensor,
    step: int,
    stream: SegmentStream,
    k: int | None,
    folder: RunFolder,
) -> None:
    """Stops before the optimizer step when loss or gradient norm is not finite; every process decides alike."""
    values = accelerator.gather(torch.stack([loss.detach().float(), norm.detach().float()]).view(1, 2))
    if values.isfinite().all():
        return
    what = "the loss" if not values[:, 0].isfinite().all() else "the norm of the gradient"
    epoch, segment = divmod(step, stream.segments_per_epoch)
    raise NonFiniteError(
        f"{what} is not finite at step {step + 1}{_at_k(k)} (epoch {epoch}, segment {segment} of the data); "
        f"stopped before the optimizer step; checkpoints up to the last good one are in {folder.checkpoints}"
    )


class _StopRequest:
    """SIGTERM and SIGINT ask for a checkpoint after the current step instead of ending the process at once."""

    def __init__(self) -> None:
        self._received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._received = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process

    def release(self) -> None:
        """From here on the signals end the process at once: all is saved, and a sweep can be done again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked; the same answer on all."""
        if accelerator.num_processes == 1:
            return self._received
        flag = torch.tensor(float(self._received), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())


def _at_k(k: int | None) -> str:
    return "" if k is None else f" at k = {k}"


def _print_header(config: TrainConfig, accelerator: Accelerator, model: nn.Module, step: int) -> None:
    method, total = config.get_method(), parameter_counts(model)["total"]
    schedule = ""
    if method.routed:
        k_min, k_max, mode = config.k_schedule()
        schedule = f", {config.num_experts} experts, k = {k_min}..{k_max} ({mode})"
    print(f"{method.title}{schedule}, seed {config.seed}, run folder {config.run_dir}")
    reason = f" ({config.scale_reason})" if config.scale_reason else ""
    print(
        f"scale {config.scale}{reason}: {total:,} parameters, {config.steps} steps of {config.batch_size} x "
        f"{config.tgt_len} bytes, {accelerator.num_processes} x {accelerator.device.type}, "
        f"precision {config.precision}"
    )
    if step:
        print(f"resumed after step {step}")
    sys.stdout.flush()


def _result(
    config: TrainConfig,
    model: nn.Module,
    accelerator: Accelerator,
    dataset: dict[str, str],
    bpc: dict[str, dict[str, float]],
    progress: dict[str, Any],
    sweep_seconds: float,
) -> dict[str, Any]:
    tokens, seconds = config.batch_size * config.tgt_len, progress["seconds"]
    counts: dict[str, Any] = parameter_counts(model)
    counts["active_per_k"] = active_per_k(model, [k for k in config.sweep_ks() if k is not None])
    return {
        "model": "transformer_xl",
        "method": config.method,
        **_label(config),
        "scale": config.scale,
        "seed": config.seed,
        "dataset": dataset,
        "bpc": bpc,
        "eval_tokens": config.eval_tokens,
        "best": {name: progress[name] for name in ("best_step", "best_bpc")},
        "parameters": counts,
        "flops": _flops(config, model),
        "seconds": {"training": seconds, "sweep": sweep_seconds, "per_step": seconds / config.steps},
        "tokens_per_step": tokens,
        "tokens_per_second": tokens * config.steps / seconds,
        "processes": accelerator.num_processes,
        "precision": config.precision,
        # Without where things were: a record is for others too.
        "config": {name: value for name, value in to_dict(config).items() if name not in PLACES},
    }


def _label(config: TrainConfig) -> dict[str, str]:
    """A name for a run that departs from its method (an ablation), to tell it from the method's own in tables."""
    names = ("router", "score", "output_scale", "schedule", "k_min", "k_max", "balance_weight", "consistency_weight")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    changed = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) != defaults[name]]
    return {"label": ", ".join([config.get_method().title, *changed])} if changed else {}


def _flops(config: TrainConfig, model: nn.Module) -> dict[str, dict[str, int]]:
    """By k: one evaluation pass by the paper's count and the true one, and one training step (forward and backward)."""
    evaluation = {"batch": config.eval_batch_size, "tgt_len": config.eval_tgt_len, "mem_len": config.eval_mem_len}
    training = {"batch": config.batch_size, "tgt_len": config.tgt_len, "mem_len": config.mem_len}
    flops = {}
    for k in config.sweep_ks():
        counted = transformer_xl_flops(model, k, **evaluation)
        step = transformer_xl_step_flops(model, config.method, k, **training)
        flops[k_name(k)] = {"paper": counted["paper"], "true": counted["true"], "training_step": step}
    return flops


def main() -> None:
    train(parse_config(TrainConfig, CONFIG_DIR, prog="python -m transformer_xl.train"))


if __name__ == "__main__":
    run_main(main)
