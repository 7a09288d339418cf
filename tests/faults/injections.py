"""What a training does to itself, in its own process, before it starts: see `before` of commands.start_command."""

import dataclasses
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import torch

import smoe.train.checkpoint
import smoe.train.loop
from smoe.methods import Method
from smoe.train.processes import Processes


def start(before: Callable[[], None] | None, begun: Path) -> None:
    """What every tiny training does first: its record goes without FLOPs, which would take most of its time.

    The file `begun` says that Python's own start, of which a test knows nothing, is over.
    """

    def make_record(task, *args, **kwargs):
        type(task).flops = lambda *_: {"training_step": 0}
        return record(task, *args, **kwargs)

    record, smoe.train.loop.make_record = smoe.train.loop.make_record, make_record
    if before is not None:
        before()
    begun.touch()


def killed_while_saving(call: int) -> None:
    """SIGKILL before or after the n-th thing that saving checkpoints does to the disk."""
    calls = 0

    def deadly(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    checkpoint = smoe.train.checkpoint
    checkpoint.save_file, checkpoint.fsync_path = deadly(checkpoint.save_file), deadly(checkpoint.fsync_path)
    Path.rename, shutil.rmtree, os.replace = deadly(Path.rename), deadly(shutil.rmtree), deadly(os.replace)
    Path.write_text = deadly(Path.write_text)


def files_limited_to(size: int) -> None:
    """Every file that grows beyond `size` bytes fails, as under a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def not_finite(steps: tuple[int, ...], value: float, where: str) -> None:
    """The loss, or one number of a gradient, is `value` at these steps (the first one is 0)."""
    now = -1
    rate_at, loss_of, clip = smoe.train.loop.learning_rate_at, Method.loss, Processes.clip_grad_norm

    def learning_rate_at(step, *args):
        nonlocal now
        now = step
        return rate_at(step, *args)

    def loss(self, *args, **kwargs):
        found = loss_of(self, *args, **kwargs)
        if where == "loss" and now in steps:
            return dataclasses.replace(found, total=found.total * value)
        return found

    def clip_grad_norm(self, model, max_norm):
        if where == "gradient" and now in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.tensor(value)
        return clip(self, model, max_norm)

    smoe.train.loop.learning_rate_at = learning_rate_at
    Method.loss, Processes.clip_grad_norm = loss, clip_grad_norm
