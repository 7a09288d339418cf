"""Scripts with several processes and machines: torchrun, and the Slurm job with stand-ins for Slurm's commands."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from commands import free_port
from processes import children
from runs import wait_for_step

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "script/table1/smoe_dropout.sh"

# The task of each machine, side by side; the highest exit code, as srun has it.
SRUN = """#!/usr/bin/env bash
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    echo $! >>"$0.tasks"
done
status=0
for task in $(jobs -p); do
    wait "$task" || { code=$?; [ "$code" -le "$status" ] || status=$code; }
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then
    printf '127.0.0.1\\nother\\n'
else
    echo "$@" >>"$0.calls"
fi
"""


@pytest.fixture
def flags(data_dir, tmp_path):
    flags = ["--scale", "smoke", "--data", data_dir, "--run_dir", tmp_path / "run", "--precision", "fp32"]
    return [*map(str, flags), "--progress", "false", "--sweep", "[16]", "--log_interval", "1"]


def test_machines_without_a_place_to_meet_are_one_line(flags):
    done = subprocess.run(
        ["bash", SCRIPT, *flags], env={**os.environ, "NNODES": "2"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "RDZV_ENDPOINT" in done.stderr.splitlines()[-1]


def test_a_slurm_job_on_two_machines_is_stopped_queues_again_and_ends(flags, tmp_path):
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_JOB_NODELIST": "two", "RDZV_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    job = ["bash", ROOT / "script/slurm/train.sbatch", SCRIPT, *flags, "--steps", "120", "--eval_interval", "120"]
    run, log = tmp_path / "run", tmp_path / "log"

    with open(log, "w") as file:
        first = subprocess.Popen(job, env=env, cwd=ROOT, stdout=file, stderr=file)
        wait_for_step(run, 5, lambda: first.poll() is None)
        for task in (tmp_path / "srun.tasks").read_text().split():  # as Slurm does before time is up
            for pid in (int(task), *children(int(task))):
                os.kill(pid, signal.SIGTERM)
        assert first.wait(240) == 75, log.read_text()
    assert "a checkpoint is written" in log.read_text()
    assert (tmp_path / "scontrol.calls").read_text() == "requeue 7\n"
    assert not (run / "result.json").exists()

    done = subprocess.run(job, env={**env, "SLURM_RESTART_COUNT": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed after step" in done.stdout and "figure:" in done.stdout
    assert json.loads((run / "result.json").read_text())["processes"] == 2


@pytest.mark.parametrize(("processes", "number"), [("1", signal.SIGTERM), ("2", signal.SIGINT)])
def test_a_signal_to_the_script_stops_what_it_runs(processes, number, flags, tmp_path):
    """SIGTERM to the script alone, as `kill` and a container that is stopped send it; Ctrl-C to all."""
    env = {**os.environ, "NPROC_PER_NODE": processes, "OMP_NUM_THREADS": "1"}
    job = ["bash", SCRIPT, *flags, "--steps", "3000", "--eval_interval", "3000"]
    with open(tmp_path / "log", "w") as file:
        script = subprocess.Popen(job, env=env, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for_step(tmp_path / "run", 5, lambda: script.poll() is None)
        if number == signal.SIGINT:
            os.killpg(script.pid, number)
        else:
            script.send_signal(number)
        assert script.wait(60) == 75, (tmp_path / "log").read_text()
        assert "a checkpoint is written" in (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody of it is left
            os.killpg(script.pid, signal.SIGKILL)
            script.wait()
