"""Table A6's scripts: the flags that each gives its trainer; and at smoke scale, as a user would call one."""

import json
import os
import subprocess
from pathlib import Path

import fine_tuning
import pytest
from modules import load

ROOT = Path(__file__).parents[2]
TABLEA6 = ROOT / "script" / "tablea6"
# The method, and the script of Table 1 that trains what is fine-tuned.
ROWS = {
    "dense_model": ("dense_dropout", "directly_dense_training"),
    "smoe": ("smoe", "smoe"),
    "smoe_dropout": ("smoe_dropout", "smoe_dropout"),
}


def test_there_is_a_script_for_every_row_and_all_runs_them():
    assert {path.stem for path in TABLEA6.glob("*.sh")} == {*ROWS, "all"}
    assert all(os.access(path, os.X_OK) for path in TABLEA6.glob("*.sh"))
    panel = load("panel_runs", "script/panel_runs.py")
    assert {*panel.read_panels("tablea6")["tablea6"]} == {f"tablea6/{name}" for name in ROWS}
    assert panel.config_class(panel.Run("tablea6/smoe", (), ())).__name__ == "QuestionAnsweringConfig"


@pytest.mark.parametrize("name", ROWS)
def test_a_row_starts_from_its_run_of_table_1(name, tmp_path):
    command = ["bash", TABLEA6 / f"{name}.sh", "--setting", "paper", "--scale", "cpu", "--seed", "3"]
    command += ["--source", "somewhere", "--subquestions", "some.json"]
    environment = {**os.environ, "SHOW_FLAGS": "1", "RUNS_DIR": str(tmp_path)}
    shown = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=True)
    flags = shown.stdout.split("\n")[:-1]
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given == {
        "--run": f"{tmp_path}/table1/bert/{ROWS[name][1]}/scale-cpu_seed-3",
        "--run_dir": f"{tmp_path}/tablea6/{name}/setting-paper_scale-cpu_seed-3",
        "--data": "data/hotpotqa",
        "--epochs": "3",
        "--batch_size": "64",
        "--learning_rate": "2e-5",
        "--warmup_steps": "0",
        "--scale": "cpu",
        "--seed": "3",
    }


def test_prepared_data_takes_no_source():
    for flag in ("--source", "--subquestions"):
        command = ["bash", TABLEA6 / "smoe.sh", "--data", "x", flag, "y"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 2 and f"so {flag} has no effect" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_script_fine_tunes_the_run_it_is_given(start, prepared, quick_bash, tmp_path):
    data, pretrained, run = fine_tuning.write_paragraphs(tmp_path / "data"), tmp_path / "pretrained", tmp_path / "run"
    common = ["--scale", "smoke", "--progress", "false", "--sweep", "16"]
    flags = ["--model", "bert", "--method", "smoe_dropout", "--data", prepared("bert"), "--run_dir", pretrained]
    first = start("bert.pretrain", *flags, *common)
    assert first.wait() == 0, first.err
    done = quick_bash(TABLEA6 / "smoe_dropout.sh", pretrained, "--data", data, "--run_dir", run, *common)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "result.json").read_text())
    assert (record["method"], record["task"]) == ("smoe_dropout", "question_answering")
    assert "n = 23" in done.stdout and (run / "slimming.png").exists() and (run / "predictions.jsonl").exists()
