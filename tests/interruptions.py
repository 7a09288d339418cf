"""Trainings that are killed or stopped and go on; what the tests of every trainer ask.

``trainer(run_dir, *flags, wait=True)`` runs one, as ``commands.starter`` makes it.
"""

import random
import signal
import time
from pathlib import Path

import pytest
from runs import assert_one_line, assert_same_weights, lines, losses, result, wait_for_step

from smoe.train.checkpoint import list_steps


def assert_same_run(run_a: Path, run_b: Path) -> None:
    """To the bit: weights, the loss and k of every line, the metrics of the result."""
    assert_same_weights(run_a, run_b)
    assert losses(run_a) == losses(run_b)
    ks = [{step: line["k"] for step, line in lines(run).items()} for run in (run_a, run_b)]
    assert ks[0] == ks[1]
    assert result(run_a)["metrics"] == result(run_b)["metrics"]


def check_kills(trainer, tmp_path: Path, kills: int, steps: int, log_interval: int) -> None:
    """SIGKILL at random moments of a training of `steps` steps: it ends with the undisturbed run's bits."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    # With an interval of 2, checkpoints fall between the lines of metrics too, whose means must not notice.
    flags = ("--steps", steps, "--eval_interval", steps // 2, "--save_interval", 3, "--log_interval", log_interval)
    assert trainer(alone, *flags).wait() == 0
    moments = sorted(random.Random().sample(range(2, steps - 2), kills))
    print("killed at", moments)  # shown if the test fails
    for moment in moments:
        command = trainer(killed, *flags, "--resume", wait=False)
        wait_for_step(killed, moment, command.process.is_alive)
        time.sleep(random.random() * 0.03)
        command.kill(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
    last = trainer(killed, *flags, "--resume")
    assert last.wait() == 0, last.err
    assert "resumed after step" in last.out
    assert_same_run(alone, killed)


def check_sigterm(trainer, tmp_path: Path, flags, stop_at: int, steps: int) -> None:
    """SIGTERM at `stop_at`: a checkpoint and one line, no result; the run goes on from there."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    flags = (*flags, "--steps", steps, "--eval_interval", steps)
    assert trainer(alone, *flags).wait() == 0
    command = trainer(stopped, *flags, wait=False)
    wait_for_step(stopped, stop_at, command.process.is_alive)
    command.kill(signal.SIGTERM)
    assert_one_line(command, 75, "a checkpoint is written")
    assert stop_at <= list_steps(stopped / "checkpoints")[-1] < steps
    assert not (stopped / "result.json").exists()
    again = trainer(stopped, *flags, "--resume")
    assert again.wait() == 0, again.err
    assert_same_weights(alone, stopped)
    assert losses(alone) == pytest.approx(losses(stopped), abs=1e-12)


def check_kill_and_sigterm(trainer, tmp_path: Path, flags) -> None:
    """SIGKILL, then SIGTERM: the run goes on both times, and ends with the undisturbed run's bits."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    flags = (*flags, "--steps", 60, "--eval_interval", 60, "--log_interval", 1)
    assert trainer(alone, *flags).wait() == 0
    flags += ("--save_interval", 4, "--resume")
    for number, step, code in ((signal.SIGKILL, 11, -signal.SIGKILL), (signal.SIGTERM, 25, 75)):
        command = trainer(stopped, *flags, wait=False)
        wait_for_step(stopped, step, command.process.is_alive)
        command.kill(number)
        assert command.wait() == code, command.err
    assert trainer(stopped, *flags).wait() == 0
    assert_same_run(alone, stopped)
