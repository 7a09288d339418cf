"""The run folder: starting, continuing and refusing to."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toy_task import toy_config

from smoe.files import write_atomic
from smoe.train.config import to_dict
from smoe.train.folder import RunFolder, open_run
from smoe.train.processes import Processes
from smoe.train.resume import MAY_CHANGE, read_config


class Other(Processes):
    """One that is not the main process."""

    rank = 1


def open_with(run_dir: Path, processes: Processes | None = None, **fields) -> RunFolder:
    return open_run(toy_config(run_dir, **fields), processes or Processes())


def test_start_then_resume(tmp_path):
    config = toy_config(tmp_path / "a" / "run", learning_rate=0.1 + 0.2, layers=(1,))
    run = open_run(config, Processes())
    assert read_config(run.path) == to_dict(config)
    assert read_config(run.path)["layers"] == [1] and read_config(run.path)["learning_rate"] == 0.1 + 0.2
    assert run.checkpoints.is_dir()
    del run  # the process that had it is gone
    run = open_run(dataclasses.replace(config, resume=True), Processes())
    assert read_config(run.path) == {**to_dict(config), "resume": True}


def test_a_run_folder_is_of_one_process_at_a_time(tmp_path):
    """Refused in a line that names the holder, until that process is gone, killed too; nothing is changed meanwhile."""
    program = (
        "import sys; from test_train_folder import open_with; run = open_with(sys.argv[1]); print('open', flush=True)"
    )
    program += "; sys.stdin.read()"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert holder.stdout.readline() == b"open\n"
        before = (tmp_path / "run" / "config.yaml").read_bytes()
        with pytest.raises(ValueError) as error:
            open_with(tmp_path / "run", resume=True, log_interval=7)
        message = (
            f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}; wait for it or stop it"
        )
        assert str(error.value) == message and (tmp_path / "run" / "config.yaml").read_bytes() == before
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    run = open_with(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        open_with(tmp_path / "run", resume=True)
    del run
    open_with(tmp_path / "run", resume=True)


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = open_with(tmp_path), open_with(tmp_path, resume=True)
    assert first.path == second.path


def test_what_a_killed_write_left_is_removed(tmp_path):
    open_with(tmp_path)
    left = tmp_path / ".config.yaml.tmp-123"
    left.write_text("half")
    open_with(tmp_path, resume=True)
    assert not left.exists()


def test_resume_where_nothing_is_simply_starts(tmp_path):
    assert open_with(tmp_path / "new", resume=True).config_path.exists()


def test_a_run_is_not_overwritten(tmp_path):
    open_with(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} already holds a run; --resume continues it"):
        open_with(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"learning_rate": 0.3}, "learning_rate: 0.3 differs from 0.02"),
        ({"sweep": (1, 3)}, r"sweep: \[1, 3\] differs from \[1, 4\]"),
        ({"k_max": 3}, "k_max: 3 differs from None"),
    ],
)
def test_resuming_with_another_configuration_names_the_field(tmp_path, change, words):
    before = open_with(tmp_path).config_path.read_text()
    with pytest.raises(ValueError, match=words):
        open_with(tmp_path, **change, resume=True)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_field_that_the_recorded_run_did_not_have_is_named(tmp_path):
    run = open_with(tmp_path)
    lines = run.config_path.read_text().splitlines(keepends=True)
    run.config_path.write_text("".join(line for line in lines if not line.startswith("clip:")))
    with pytest.raises(ValueError, match="clip: 0.25 differs from '\\(absent\\)'"):
        open_with(tmp_path, resume=True)


def test_what_changes_no_number_may_change_and_is_recorded(tmp_path):
    open_with(tmp_path)
    changes = {"save_interval": 3, "log_interval": 2, "progress": True, "process_timeout": 9.0, "expert_parallel": 2}
    changes |= {"skip_nonfinite": 3, "fsdp": True, "engine": "torch", "scale": "cpu", "scale_reason": "another"}
    run = open_with(tmp_path, **changes, resume=True)
    assert read_config(run.path).items() >= changes.items()
    assert set(MAY_CHANGE) == {*changes, "resume", "run_dir", "data"}


@pytest.mark.parametrize("part", ["metrics.jsonl", "result.json", "checkpoints"])
def test_parts_without_a_configuration_are_not_mixed_with_a_new_run(tmp_path, part):
    (tmp_path / part).write_text("{}")
    with pytest.raises(ValueError, match=f"has {part} but no config.yaml"):
        open_with(tmp_path, resume=True)
    (tmp_path / part).rename(tmp_path / "train.log")  # someone's log is no obstacle
    open_with(tmp_path)


def killed_at(call: int, run: Path) -> bool:
    """Starts a run in a child that dies before its n-th change of the folder; False if there are fewer."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    calls = itertools.count(1)

    def deadly(change):
        def changes(path, *args, **kwargs):
            if str(path).startswith(str(run)) and next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(path, *args, **kwargs)

        return changes

    try:
        os.mkdir, os.replace = deadly(os.mkdir), deadly(os.replace)
        open_with(run)
    finally:
        os._exit(0)


def test_a_kill_while_it_starts_leaves_a_folder_in_which_it_can_start(tmp_path):
    for call in range(1, 10):
        run = tmp_path / f"run-{call}"
        if not killed_at(call, run):
            break
        assert open_with(run, resume=True).checkpoints.is_dir(), call
    assert 3 < call < 9


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        open_with(tmp_path / "f")
    with pytest.raises(ValueError, match="not a run folder"):
        read_config(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    with pytest.raises(ValueError, match=f"run_dir: {tmp_path / 'run'} must be a folder that all processes share"):
        open_with(tmp_path / "run", Other())
    assert not (tmp_path / "run").exists()
    before = open_with(tmp_path / "run").config_path.read_bytes()
    assert (
        open_with(tmp_path / "run", Other(), seed=2).config_path.read_bytes() == before
    )  # the main one checks for all


def test_result_round_trip_and_refusals(tmp_path):
    run = open_with(tmp_path)
    run.write_result({"bpc": {"test": {"1": 0.1 + 0.2}}})
    assert json.loads(run.result_path.read_text()) == {"bpc": {"test": {"1": 0.1 + 0.2}}}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="result.json: .*every number must be finite"):
            run.write_result({"bpc": bad})
    assert json.loads(run.result_path.read_text())["bpc"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("smoe.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
