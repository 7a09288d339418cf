"""Table 3's scripts: the flags that each gives its trainer; and at smoke scale, as a user would call them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from example_data import write_sentences
from modules import load

ROOT = Path(__file__).parents[2]
TABLE3 = ROOT / "script" / "table3"
METHOD_OF = {"dense_model": "dense_dropout", "smoe_dropout": "smoe_dropout", "smoe": "smoe", "thor": "thor"}


def test_there_is_a_script_for_every_row_and_all_runs_them():
    assert {path.stem for path in TABLE3.glob("*.sh")} == {*METHOD_OF, "all"}
    panel = load("panel_runs", "script/panel_runs.py")
    assert {*panel.read_panels("table3")["table3"]} == {f"table3/{name}" for name in METHOD_OF}
    assert panel.config_class(panel.Run("table3/smoe", (), ())).__name__ == "DistilConfig"


@pytest.mark.parametrize("name", METHOD_OF)
def test_the_teacher_is_that_of_table_2(name, tmp_path):
    command = ["bash", TABLE3 / f"{name}.sh", "--scale", "cpu", "--seed", "3", "--temperature", "4"]
    environment = {**os.environ, "SHOW_FLAGS": "1", "RUNS_DIR": str(tmp_path)}
    shown = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=True)
    flags = shown.stdout.split("\n")[:-1]
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given == {
        "--teacher": f"{tmp_path}/table2/sst2/{name}/scale-cpu_seed-3",
        "--run_dir": f"{tmp_path}/table3/{name}/scale-cpu_seed-3_temperature-4",
        "--scale": "cpu",
        "--seed": "3",
        "--temperature": "4",
    }


def test_the_teacher_is_looked_for_where_its_script_trains_it(tmp_path):
    def shown(script: str, flag: str) -> str:
        command = ["bash", str(ROOT / "script" / script), "--scale", "cpu", "--data", str(tmp_path)]
        environment = {**os.environ, "SHOW_FLAGS": "1", "RUNS_DIR": str(tmp_path)}
        words = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
        return words[words.index(flag) + 1]

    assert shown("table3/thor.sh", "--teacher") == shown("table2/sst2/thor.sh", "--run_dir")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_OF)
def test_script_distils_the_run_it_is_given(name, start, quick_bash, tmp_path):
    data = write_sentences(tmp_path / "sst2", {"train": 40, "valid": 11})
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    common = ["--scale", "smoke", "--data", data, "--progress", "false"]
    flags = ["--method", METHOD_OF[name], "--steps", 4, "--eval_interval", 4, "--sweep", 16, "--run_dir", teacher]
    trained = start("transformer_xl.classify", *common, *flags)
    assert trained.wait() == 0, trained.err
    done = quick_bash(TABLE3 / f"{name}.sh", teacher / "checkpoints/step-00000004", *common, "--run_dir", run)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "result.json").read_text())
    assert (record["task"], record["teacher"]["method"], record["config"]["d_hidden"]) == (
        "distillation", METHOD_OF[name], 8,
    )  # fmt: skip
    assert f"{record['metrics']['accuracy']['valid']['dense']:.4f}" in done.stdout and "n = 11" in done.stdout
