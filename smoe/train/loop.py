"""The training loop: one page, in the order in which things happen, the same for every task.

``Task`` says what differs between trainings, ``Processes`` hides whether there are several processes.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smoe.control import set_top_k
from smoe.environment import environment_record
from smoe.errors import NonFiniteError, Stopped
from smoe.files import write_atomic
from smoe.parameters import parameter_groups
from smoe.train.checkpoint import checkpoint_path, save_checkpoint
from smoe.train.config import TrainConfig, to_dict
from smoe.train.evaluation import k_name, measure, sweep
from smoe.train.folder import open_run
from smoe.train.learning_rate import learning_rate_at
from smoe.train.log import Log, at_k, one_or_all, print_header
from smoe.train.processes import Processes
from smoe.train.record import make_record
from smoe.train.resume import check_finished, load_checkpoint, load_weights, newest_checkpoint, restore
from smoe.train.state import optimizer_tensors, rng_tensors
from smoe.train.stop import StopRequest
from smoe.train.task import Task


@dataclass
class Progress:
    """How far a run has come; a resumed one goes on from it."""

    step: int = 0  # finished ones
    seconds: float = 0.0  # of training
    skipped: int = 0  # steps that were left out, since something was not finite
    # The best checkpoint at each k of ``config.eval_ks()``, in that order: {"step": finished steps, "value": metric}.
    best: dict[str, dict[str, Any]] = field(default_factory=dict)

    def is_over(self, config: TrainConfig) -> bool:
        """Whether all steps are done, or ``patience`` evaluations have brought no new best.

        A best checkpoint is of an evaluation, so its step says how many there were since: nothing more is kept, and a
        resumed run stops where it would have.
        """
        best = self.best.get(k_name(config.eval_ks()[0]))
        waited = 0 if best is None else (self.step - best["step"]) // config.eval_interval
        return self.step >= config.steps or config.patience is not None and waited >= config.patience


def train(task_class: type[Task], config: TrainConfig, processes: Processes) -> None:
    """Runs ``config`` to its end: trains, sweeps over k from the best checkpoint, writes result.json.

    Raises Stopped when a signal asked to stop: a checkpoint is written then, and ``--resume`` goes on from it.
    """
    # ---- before anything is written: configuration, data, model -----------------------------------------------------
    environment = environment_record()  # now: the checkout may move on while this runs
    with processes.together():
        config = config.resolved()  # so a resume on another machine computes alike or says why it can't
    processes.configure(config)
    with processes.together():
        task = task_class(config, processes.rank, processes.world_size)
    processes.agree({"data": task.dataset})
    folder = open_run(config, processes)
    if folder.result_path.exists():
        with processes.together():
            check_finished(folder.result_path, task)
        if processes.is_main:
            print(f"{config.run_dir} is finished; its result is in {folder.result_path}")
        return processes.leave()
    for file in task.files() if processes.is_main else ():
        shutil.copyfile(file, folder.path / file.name)

    # ---- where it starts --------------------------------------------------------------------------------------------
    method, decides, device = config.get_method(), task.metrics[0], processes.device
    if processes.is_main:
        print_header(task, processes)
    model = processes.prepare(task.model, task.blocks, config.fsdp)
    decay = config.weight_decay  # without it AdamW is Adam
    trained = parameter_groups(task.model, decay) if decay else task.model.parameters()
    betas = (0.9, config.beta2)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=betas, weight_decay=decay, fused=True)
    torch.manual_seed(config.seed + 1000 * processes.rank)  # equal weights everywhere, different dropout
    progress = Progress()
    checkpoint = newest_checkpoint(folder.checkpoints, processes) if config.resume else None
    if checkpoint is not None:
        progress = Progress(**checkpoint.state["progress"])
        restore(checkpoint, task, optimizer, processes)
    log = Log(task, folder, processes, checkpoint)
    checkpoint = None  # its tensors are the model's and the optimizer's now
    stop, stopped = StopRequest(), False
    model.train()

    while not progress.is_over(config) and not stopped:
        step, started = progress.step, time.perf_counter()  # the first step is 0

        # ---- learning rate and k ------------------------------------------------------------------------------------
        learning_rate = learning_rate_at(step, config.steps, config.learning_rate, config.warmup_steps, config.decay)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        ks = config.ks_at(step)
        if ks:
            set_top_k(task.model, ks)

        # ---- batch, loss, backward, clip ----------------------------------------------------------------------------
        batch = task.batch(step)
        loss = method.loss(
            task.model,
            lambda: task.forward(model, batch, device),  # noqa: B023 (called at once)
            balance_weight=config.balance_weight,
            consistency_weight=config.consistency_weight,
        )
        loss.total.backward()
        norm = processes.clip_grad_norm(task.model, config.clip)

        # ---- step, unless something is not finite -------------------------------------------------------------------
        finite = check_finite(loss.total, norm, progress, ks, task, processes)
        if finite:
            optimizer.step()
            task.carry(loss.output)
        optimizer.zero_grad()
        progress.step = step = step + 1  # from here on: finished steps
        log.count(loss if finite else None)
        progress.seconds += time.perf_counter() - started

        # ---- log, evaluate, save, stop ------------------------------------------------------------------------------
        last = step == config.steps
        if step % config.log_interval == 0 or last:
            log.train(step, loss, ks, learning_rate, norm, progress.seconds, progress.skipped)
        evaluated = step % config.eval_interval == 0 or last
        if evaluated:
            for k in config.eval_ks():
                measured = measure(task, "valid", k, processes)
                log.evaluation(step, "valid", measured, k, progress.seconds)
                value, best = measured.values[decides.key], progress.best.get(k_name(k))
                if decides.better(value, best and best["value"]):
                    progress.best[k_name(k)] = {"step": step, "value": value}
        stopped = stop.requested(processes)
        if evaluated or stopped or step % (config.save_interval or config.eval_interval) == 0:
            save(task, optimizer, progress, log, processes)
            log.new_interval()

    log.close()
    stop.release()
    if progress.step < config.steps and not stopped and processes.is_main:
        print(f"no new best in {config.patience} evaluations: ends after step {progress.step} of {config.steps}")
    if stopped:
        processes.leave()
        message = f"stopped by a signal after step {progress.step}; a checkpoint is written, --resume goes on from it"
        raise Stopped(message if processes.is_main else "")

    # ---- the sweep over k, from the best checkpoint at each k that one is chosen at ---------------------------------
    chosen = [(k, progress.best[k_name(k)]) for k in config.eval_ks() if k_name(k) in progress.best]
    if not chosen or chosen[0][0] != config.eval_ks()[0]:
        raise NonFiniteError(f"no evaluation on valid gave a finite {decides.title}: there is no best checkpoint")
    started, swept, files, weights_of = time.perf_counter(), {}, None, progress.step
    for step in dict.fromkeys(best["step"] for _, best in chosen):  # the first one is the run's best
        if step != weights_of:
            weights = load_checkpoint(checkpoint_path(folder.checkpoints, step), groups=["model"])
            load_weights(weights, task, processes)
            weights_of = step
        swept[step] = sweep(task, processes)
        files = task.result_files(processes) if files is None else files
    if processes.is_main:
        sweep_seconds, per_step = time.perf_counter() - started, progress.seconds / progress.step
        seconds = {"training": progress.seconds, "sweep": sweep_seconds, "per_step": per_step}
        folder.check_there()
        for name, content in files.items():
            write_atomic(folder.path / name, content)
        run = {"tokens_per_second": task.tokens_per_step / per_step, "processes": processes.world_size}
        run |= {"steps": progress.step, "skipped_steps": progress.skipped}
        folder.write_result(make_record(task, chosen, swept, seconds=seconds, **run, environment=environment))
    processes.leave()


def check_finite(
    loss: Tensor, norm: Tensor, progress: Progress, ks: list[int], task: Task, processes: Processes
) -> bool:
    """Whether to take the optimizer step; all processes decide alike.

    At most ``skip_nonfinite`` steps of a run whose loss or gradient is not finite are left out; the next one stops it.
    """
    values = processes.gather(torch.stack([loss.detach().float(), norm.detach().float()]).view(1, 2))
    if values.isfinite().all():
        return True
    what = "the norm of the gradient" if values[:, 0].isfinite().all() else "the loss"
    step, allowed = progress.step, task.config.skip_nonfinite
    what = f"{what} is not finite at step {step + 1}{at_k(one_or_all(ks))} ({task.where(step)})"
    if progress.skipped == allowed:
        raise NonFiniteError(
            f"{what}; stopped before the optimizer step; checkpoints up to the last good one are in "
            f"{task.config.run_dir}/checkpoints"
        )
    progress.skipped += 1
    if processes.is_main:
        print(f"warning: {what}; left out, {progress.skipped} of skip_nonfinite = {allowed}", file=sys.stderr)
    return False


def save(task: Task, optimizer: torch.optim.Optimizer, progress: Progress, log: Log, processes: Processes) -> None:
    """Writes a checkpoint of everything that a resumed run needs, whole whatever the number of processes.

    The newest two and the best ones are kept.
    """
    with processes.together():
        if processes.is_main:
            log.folder.check_there()
    bare = task.bare()
    groups: dict[str, Any] = {
        "model": processes.gather_state(bare.state_dict(), bare),
        "optimizer": processes.gather_state(optimizer_tensors(optimizer, bare), bare),
        "task": {name: processes.gather(rows.contiguous()) for name, rows in task.state().items()},
    }
    tensors = (groups if processes.is_main else {}) | {f"rng-rank{processes.rank}": rng_tensors()}
    state = {"progress": vars(progress), "nats": processes.sum(log.nats).tolist()}
    state |= {"world_size": processes.world_size, "facts": task.facts}
    state |= {"task": task.name, "dataset": task.dataset, "config": to_dict(task.config)}
    best = {chosen["step"] for chosen in progress.best.values()}
    save_checkpoint(log.folder.checkpoints, progress.step, tensors, state, processes=processes, protect=best)
