"""all.sh of tables and figures: each run is trained once, whatever is killed.

How runs are started, locked, stopped and collected is tested with a trainer that sleeps; one test trains.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import children

ROOT = Path(__file__).parents[2]

# ---- running them, with a trainer that sleeps -----------------------------------------------------------------------
TRAINER = """
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh
name=$1
shift
run_dir=$(run_dir_of "$name" "$@")
set -- "$@" --run_dir "$run_dir"
show_flags "$@"
trap 'echo "error: stopped" >&2; exit 75' TERM
[ ! -f "$run_dir/result.json" ] || exit 0
echo "threads ${OMP_NUM_THREADS:-unset}" >>"$run_dir/starts"
case " $* " in *" --fail "*) echo "a warning"; echo "error: k is 99" >&2; exit 2 ;; esac
for _ in $(seq "${STEPS:-4}"); do sleep 0.1; done
record='{"scale": "smoke", "seed": 1, "seconds": {"training": 60, "sweep": 65}}'
echo "$record" >"$run_dir/.result" && mv "$run_dir/.result" "$run_dir/result.json"
"""
NAMES = ("one", "two", "three", "four")


@pytest.fixture
def checkout(tmp_path):
    """A checkout with panel.py and what it needs, and a figure of four runs."""
    (tmp_path / "script/figure").mkdir(parents=True)
    for file in ("panel.py", "panel_runs.py", "common.sh"):
        shutil.copy(ROOT / "script" / file, tmp_path / "script")
    (tmp_path / "script/trainer.sh").write_text(TRAINER)
    for name in NAMES:
        call = f'exec bash "$(dirname "$0")/../trainer.sh" figure/{name} "$@"\n'
        (tmp_path / f"script/figure/{name}.sh").write_text(call)
    panels = {"a": ["figure/one", "figure/two"], "b": ["figure/two", "figure/three", "figure/four --flag x/y"]}
    (tmp_path / "script/figure/runs.yaml").write_text(yaml.safe_dump(panels))
    return tmp_path


def start(checkout, *flags, steps=4, **variables):
    """`steps`: tenths of a second that each run takes; `variables`: of the environment."""
    command = [sys.executable, checkout / "script/panel.py", "figure", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"STEPS": str(steps)} | {name: str(value) for name, value in variables.items()}
    pipe = subprocess.PIPE
    return subprocess.Popen([*map(str, command)], stdout=pipe, stderr=pipe, text=True, env=environment)


def call(checkout, *flags):
    """(exit code, stdout) of a command that has nothing to complain of."""
    process = start(checkout, *flags, steps=0)
    out, err = process.communicate(timeout=60)
    assert err == ""
    return process.returncode, out


def starts(checkout):
    """By run: how often it was started."""
    files = (checkout / "runs/figure").glob("*/*/starts")
    return {file.parents[1].name: len(file.read_text().splitlines()) for file in files}


def finished(checkout):
    """By run: what a record that is written anew would change."""
    files = (checkout / "runs/figure").glob("*/*/result.json")
    return {file.parents[1].name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def kill_all(process):
    """Kills a panel and what it has started, each at once."""
    trainings = children(process.pid)
    process.kill()
    for pid in trainings:
        os.killpg(pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_run_once_in_the_folder_of_its_script(checkout):
    code, out = call(checkout)
    assert code == 0 and out.splitlines()[-1].endswith("4 finished, 0 failed, 0 left")
    assert starts(checkout) == dict.fromkeys(NAMES, 1)  # `two` is in both panels
    assert (checkout / "runs/figure/four/flag-x-y/result.json").exists()
    before = finished(checkout)
    assert call(checkout)[0] == 0
    assert (starts(checkout), finished(checkout)) == (dict.fromkeys(NAMES, 1), before)


def test_a_selection_with_seeds_scale_and_flags_of_the_trainer(checkout):
    code, out = call(checkout, "--panel", "b", "--only", "t*", "--seeds", 1, 2, "--scale", "cpu", "--steps", 5)
    assert code == 0
    folders = sorted(str(path.parent.relative_to(checkout / "runs/figure")) for path in checkout.rglob("result.json"))
    assert folders == [f"{n}/scale-cpu_seed-{s}_steps-5" for n in ("three", "two") for s in (1, 2)]
    started = [line.split(" started: ")[1].split(",")[0] for line in out.splitlines() if " started: " in line]
    order = [f"figure/{n} --scale cpu --seed {s} --steps 5" for s in (1, 2) for n in ("two", "three")]
    assert started == order, "not all of the first seed first"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--panel", "z"), "--panel: 'z', expected one of a, b"),
        (("--only", "t*", "five"), "--only: 'five' is none of figure/one, figure/two"),
        (("--jobs", 0), "--jobs: 0, it must be at least 1"),
        (("--seeds", "x"), "invalid int value: 'x'"),
        (("--seed", 1), "--seed is of a single run; give --seeds"),
        (("--run-dir=x",), "--run_dir is of a single run"),
    ],
)
def test_bad_flags_are_one_line(checkout, flags, words):
    process = start(checkout, *flags)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (checkout / "runs").exists()


def test_side_by_side_on_a_core_each(checkout):
    process = start(checkout, "--jobs", 4, steps=20)
    wait_for(lambda: len(starts(checkout)) == 4)
    assert finished(checkout) == {} and process.wait(60) == 0
    assert {file.read_text() for file in checkout.rglob("starts")} == {"threads 1\n"}
    assert call(checkout, "--seeds", 7, "--only", "one")[0] == 0
    assert (checkout / "runs/figure/one/seed-7/starts").read_text() == "threads unset\n"


def test_what_waits_for_a_pretrained_run_takes_no_place(checkout):
    lines = ["figure/one --run base", "figure/two --run base", "figure/three --run other", "figure/four"]
    (checkout / "script/figure/runs.yaml").write_text(yaml.safe_dump({"a": lines}))
    started = lambda: [*starts(checkout)]  # noqa: E731
    process = start(checkout, "--jobs", 2, steps=30)
    wait_for(lambda: len(started()) == 2)
    time.sleep(0.5)  # `two` would start now
    assert sorted(started()) == ["one", "three"]
    assert process.wait(60) == 0 and sorted(started()) == sorted(NAMES)
    for path in checkout.glob("runs/figure/*"):
        shutil.rmtree(path)
    for base in ("base", "other"):
        (checkout / base).mkdir()
        (checkout / base / "result.json").write_text("{}")
    process = start(checkout, "--jobs", 2, steps=10)
    wait_for(lambda: len(started()) == 2)
    assert sorted(started()) == ["one", "two"] and process.wait(60) == 0


def test_two_at_once_share_the_work(checkout):
    first, second = start(checkout), start(checkout)
    outs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0
    assert starts(checkout) == dict.fromkeys(NAMES, 1)
    began = [out.count(" started: ") for out in outs]
    assert sum(began) == 4 and min(began) >= 1
    assert all(out.splitlines()[-1].endswith("4 finished, 0 failed, 0 left") for out in outs)


def test_what_a_killed_one_had_started_is_waited_for(checkout):
    first = start(checkout, steps=30)
    wait_for(lambda: starts(checkout) == {"one": 1})
    first.kill()
    assert "waiting for 1 that" in call(checkout, "--only", "one")[1]
    assert starts(checkout) == {"one": 1} and len(finished(checkout)) == 1


@pytest.mark.parametrize("when", [1, 2, 3])
def test_killed_with_all_that_it_started_it_goes_on(checkout, when):
    first = start(checkout)
    wait_for(lambda: len(starts(checkout)) == when)
    kill_all(first)
    before = finished(checkout)
    assert len(before) == when - 1
    assert call(checkout)[0] == 0
    after = finished(checkout)
    assert len(after) == 4 and {name: after[name] for name in before} == before
    assert starts(checkout) == {name: 2 if i == when else 1 for i, name in enumerate(NAMES, 1)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_what_runs_and_starts_nothing_more(checkout, number):
    first = start(checkout, "--jobs", 2, steps=100)
    wait_for(lambda: len(starts(checkout)) == 2)
    first.send_signal(number)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 75 and err == ""
    assert out.count(" stopped: ") == 2 and out.splitlines()[-1].endswith("0 finished, 0 failed, 4 left")
    assert finished(checkout) == {} and len(starts(checkout)) == 2
    assert call(checkout)[0] == 0 and len(finished(checkout)) == 4


def test_a_run_that_fails_does_not_stop_the_others(checkout):
    script = checkout / "script/figure/two.sh"
    script.write_text(script.read_text().replace('"$@"', '"$@" --fail'))
    code, out = call(checkout)
    assert code == 1 and out.splitlines()[-1].endswith("3 finished, 1 failed, 0 left")
    (failed,) = [line for line in out.splitlines() if "failed: " in line]
    assert "figure/two" in failed and failed.endswith("error: k is 99")
    assert sorted(finished(checkout)) == ["four", "one", "three"]
    # It is tried again, and says the same although its log has grown.
    assert call(checkout)[1].count("error: k is 99") == 1 and starts(checkout)["two"] == 2


def test_dry_run_says_what_is_left_and_how_long_the_last_one_took(checkout):
    assert call(checkout, "--only", "one", "two", "--seeds", 1)[0] == 0
    (checkout / "runs/figure/three/seed-2").mkdir(parents=True)
    (checkout / "runs/figure/three/seed-2/config.yaml").touch()
    running = start(checkout, "--only", "one", "--seeds", 2, steps=30)
    wait_for(lambda: (checkout / "runs/figure/one/seed-2/starts").exists())
    before = sorted(checkout.rglob("*"))
    code, out = call(checkout, "--seeds", 1, 2, "--dry_run", "--jobs", 2)
    assert code == 0
    lines = [line.split("  ") for line in out.splitlines()]
    states = {line[-1].strip(): (line[0].strip(), line[-2].strip() or line[-3].strip()) for line in lines[:-1]}
    assert states == {
        "figure/one --seed 1": ("finished", "125 s"),
        "figure/two --seed 1": ("finished", "125 s"),
        "figure/three --seed 1": ("new", "-"),
        "figure/four --flag x/y --seed 1": ("new", "-"),
        "figure/one --seed 2": ("running", "125 s"),
        "figure/two --seed 2": ("new", "125 s"),
        "figure/three --seed 2": ("cut off", "-"),
        "figure/four --flag x/y --seed 2": ("new", "-"),
    }
    assert out.splitlines()[-1] == (
        "2 of 8 finished; 2 take about 125 s together; 4 that have never run take an unknown time"
    )
    assert sorted(checkout.rglob("*")) == before, "a dry run has written something"
    assert running.wait(60) == 0


def test_records_are_collected_only_when_asked_for(checkout):
    assert call(checkout, "--scale", "smoke", "--seeds", 1)[0] == 0
    assert not (checkout / "results").exists()
    said, folder = '{"id": "0", "16": ["1", 1]}\n', next((checkout / "runs/figure/two").glob("*/result.json")).parent
    for name in ("predictions.jsonl", "predictions_multi_hop.jsonl"):
        (folder / name).write_text(said)
    assert call(checkout, "--scale", "smoke", "--seeds", 1, "--collect")[0] == 0
    files = sorted(path.name for path in (checkout / "results/figure/smoke").iterdir())
    assert files == ["four_flag_x-y-seed1.json", "one-seed1.json", "three-seed1.json", "two-seed1.json",
                     "two-seed1.predictions.jsonl.gz", "two-seed1.predictions_multi_hop.jsonl.gz"]  # fmt: skip
    for name in files[-2:]:
        assert gzip.decompress((checkout / "results/figure/smoke" / name).read_bytes()).decode() == said
    record = checkout / "results/figure/smoke/one-seed1.json"
    assert record.read_text() == next((checkout / "runs/figure/one").glob("*/result.json")).read_text()
    # Where the data are on this machine is in no name.
    assert call(checkout, "--scale", "smoke", "--seeds", 1, "--collect", "--source", "/some/where", "else")[0] == 0
    assert sorted(path.name for path in (checkout / "results/figure/smoke").iterdir()) == files


def test_paths_start_where_all_sh_is_called(checkout):
    here = checkout / "else where"
    here.mkdir()
    flags = ["--only", "one", "--source", "a", "../b", "--start-from=c", "--flag", "a", "--text", "/d"]
    flags += ["--collect", "kept"]
    process = start(checkout, *flags, CALLED_FROM=here)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    places = f"--source '{here}/a' '{here}/../b' '--start-from={here}/c' --flag a --text /d"
    assert f"finished: figure/one {places}, in " in out and len([*(here / "kept").rglob("*.json")]) == 1


def test_all_sh_says_where_it_is_called(tmp_path):
    command = ["bash", ROOT / "script/table1/all.sh", "--only", "table1/bert/smoe", "--source", "a", "--dry_run"]
    environment = {name: value for name, value in os.environ.items() if name != "CALLED_FROM"}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"table1/bert/smoe --source {tmp_path}/a\n" in done.stdout, done.stderr


# ---- for real -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_in_the_middle_of_a_training_all_sh_finishes_the_rest(data_dir, tmp_path):
    command = ["bash", ROOT / "script/figure5/all.sh", "--panel", "d", "--only", "*constant*", "--scale", "smoke"]
    command += ["--seeds", "1", "--data", data_dir, "--progress", "false", "--sweep", "8", "--steps", "40"]
    command += ["--collect", tmp_path / "results"]
    environment = {**os.environ, "RUNS_DIR": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}

    def results():
        return {path.parents[1].name: path.stat() for path in (tmp_path / "runs/figure5").glob("*/*/result.json")}

    def steps(name):
        files = [*(tmp_path / "runs/figure5" / name).glob("*/metrics.jsonl")]
        return len(files[0].read_text().splitlines()) if files else 0

    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)
        wait_for(lambda: steps("constant_k2_smoe_dropout") > 0 or first.poll() is not None, 240)
    kill_all(first)
    before = results()
    assert list(before) == ["constant_k8_smoe_dropout"], (tmp_path / "log").read_text()

    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stderr == "", done.stdout
    after = results()
    kept = after["constant_k8_smoe_dropout"]
    old = before["constant_k8_smoe_dropout"]
    assert (kept.st_ino, kept.st_mtime_ns) == (old.st_ino, old.st_mtime_ns) and len(after) == 2
    collected = sorted((tmp_path / "results/figure5/smoke").iterdir())
    assert [json.loads(path.read_text())["config"]["k_max"] for path in collected] == [2, 8]

    # A scale that has changed since: the flags and with them the folder are the same, the settings are not.
    (config,) = (tmp_path / "runs/figure5/constant_k2_smoe_dropout").glob("*/config.yaml")
    config.write_text(config.read_text().replace("d_model: 32", "d_model: 64").replace("d_hidden_share: null\n", ""))
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=240)
    (line,) = [line for line in done.stdout.splitlines() if "failed: " in line]
    assert done.returncode == 1 and "d_model is 64 in " in line and "but 32 today" in line and "move" in line
    assert done.stdout.splitlines()[-1].endswith("1 finished, 1 failed, 0 left") and results() == after
    done = subprocess.run([*map(str, command), "--dry_run"], env=environment, capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["finished", "changed", "1"]
