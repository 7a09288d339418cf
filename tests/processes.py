"""A trainer on several processes; what the tests of every trainer ask.

`trainer(run_dir, *flags, ranks=n, own={rank: flags})` starts the processes of one run with gloo.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import free_port
from runs import assert_close_runs, assert_one_line, assert_same_weights, losses, result, wait_for_step

# Every layer at every k from 1 to 16, gradients above the clip, an evaluation that no number of processes divides; no
# dropout, which differs from process to process.
GROWING = (
    "--dropout",
    0,
    "--expert_dropout",
    0,
    "--k_min",
    1,
    "--log_interval",
    1,
    "--sweep",
    16,
    "--eval_batch_size",
    3,
)


def finish(commands) -> None:
    for command in commands:
        assert command.wait() == 0, command.err
        assert command.err == "", command.err


def check_equals_one_process(trainer, tmp_path: Path, shapes) -> None:
    """Twenty steps on (processes, expert_parallel, fsdp) are those of one process."""
    one = tmp_path / "one"
    finish(trainer(one, *GROWING))
    assert len(losses(one)) == 20
    for ranks, expert_parallel, fsdp in shapes:
        run = tmp_path / f"{ranks}-{expert_parallel}-{fsdp}"
        finish(trainer(run, *GROWING, "--expert_parallel", expert_parallel, "--fsdp", fsdp, ranks=ranks))
        assert_close_runs(one, run)
        assert [result(run)[name] for name in ("processes", "expert_parallel", "fsdp")] == [
            ranks,
            expert_parallel,
            fsdp,
        ]


def check_examples_on_two(trainer, tmp_path: Path, metric: str, split: str) -> None:
    """A fine-tuning on two processes with expert parallelism equals one process; its metric up to one example."""
    flags = ("--log_interval", 1, "--eval_batch_size", 4)
    for ranks in (1, 2):
        finish(trainer(tmp_path / str(ranks), *flags, "--expert_parallel", ranks, ranks=ranks))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-5)
    one, two = (result(tmp_path / ranks)["metrics"][metric] for ranks in "12")
    assert one["n"] == two["n"]
    assert one[split] == pytest.approx(two[split], abs=1 / one["n"][split] + 1e-9)


def check_resumes_at_any_number(trainer, tmp_path: Path, fsdp: bool) -> None:
    """A checkpoint of 4 processes goes on at 1, 2 and 4 with the same losses, however they are spread."""
    four = tmp_path / "four"
    finish(trainer(four, *GROWING, "--expert_parallel", 2, "--fsdp", fsdp, ranks=4))
    shutil.rmtree(four / "checkpoints" / "step-00000020")
    (four / "result.json").unlink()
    want = losses(four)
    for ranks, expert_parallel in ((1, 1), (2, 2), (4, 4)):
        run = tmp_path / f"{ranks}"
        shutil.copytree(four, run)
        flags = ("--expert_parallel", expert_parallel, "--fsdp", ranks == 4 and not fsdp, "--resume")
        commands = trainer(run, *GROWING, *flags, ranks=ranks)
        finish(commands)
        assert "resumed after step 10" in commands[0].out
        assert ("random generators start anew" in commands[0].out) == (ranks != 4)
        assert losses(run) == pytest.approx(want, abs=1e-5)


def check_disagreement(trainer, tmp_path: Path, flags, own, words) -> None:
    """Two processes that can't run together say so, each in one line, and leave nothing."""
    run = tmp_path / "run"
    for command in trainer(run, *flags, ranks=2, own={1: own}):
        assert_one_line(command, 2, *words)
    assert not run.exists()


def check_signal_to_one_stops_all(trainer, tmp_path: Path) -> None:
    """SIGTERM to one of two: a checkpoint, both end; the run goes on from it bit for bit."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    flags = ("--steps", 60, "--eval_interval", 60, "--log_interval", 1, "--sweep", 16, "--expert_parallel", 2)
    finish(trainer(alone, *flags, ranks=2))
    first, second = trainer(stopped, *flags, ranks=2)
    wait_for_step(stopped, 7, second.process.is_alive)
    second.kill(signal.SIGTERM)
    assert_one_line(first, 75, "a checkpoint is written")
    assert second.wait() == 75 and second.err == ""
    assert 7 <= max(losses(stopped)) < 60
    finish(trainer(stopped, *flags, "--resume", ranks=2))
    assert_same_weights(alone, stopped)
    assert losses(alone) == pytest.approx(losses(stopped), abs=1e-12)


def check_death_of_one_is_noticed(trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = trainer(run, "--steps", 5000, "--eval_interval", 5000, "--log_interval", 1, ranks=2)
    wait_for_step(run, 3, first.process.is_alive)
    second.kill(signal.SIGKILL)
    assert_one_line(first, 1, "lost contact with another process")


def check_torchrun_restarts(trainer, module: str, argv, tmp_path: Path) -> None:
    """A worker killed under torchrun: it restarts all, the run goes on, and ends with the undisturbed run's weights."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    flags = ("--steps", 60, "--eval_interval", 30, "--save_interval", 4, "--log_interval", 1, "--sweep", 16)
    flags += ("--expert_parallel", 2)
    undisturbed = trainer(alone, *flags, ranks=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--max_restarts", 2]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--monitor_interval", 0.1]
    command = [*launch, "-m", module, *argv, *flags, "--run_dir", killed]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
    try:
        wait_for_step(killed, 13, lambda: process.poll() is None)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        for pid in (*children(process.pid), process.pid) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.wait()
    finish(undisturbed)
    assert "resumed after step" in (tmp_path / "log").read_text()
    assert_same_weights(alone, killed)
    assert losses(alone) == pytest.approx(losses(killed), abs=1e-12)
    assert result(alone)["metrics"] == result(killed)["metrics"]


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in listed.stdout.split()]
