"""Table 2's scripts at smoke scale, as a user would call them: fine-tune a pretrained run, print its table."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "script" / "table2" / "sst2").glob("*.sh"))
METHOD_OF = {"dense_model": "dense_dropout", "smoe_dropout": "smoe_dropout", "smoe": "smoe", "thor": "thor"}


def bash(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, argv)], capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("classify_tests", ROOT / "tests/transformer_xl/test_classify.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("sst2")
    module.write(folder, {"train": 40, "valid": 11})
    return folder


def test_there_is_a_script_for_every_row():
    assert {script.stem for script in SCRIPTS} == METHOD_OF.keys()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_fine_tunes_the_run_it_is_given(script, data_dir, sentences, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    common = ["--scale", "smoke", "--progress", "false", "--sweep", "16"]
    first = bash(
        ROOT / "script/transformer_xl.sh", "x", "--method", METHOD_OF[script.stem], "--data", data_dir,
        "--run_dir", pretrained, *common,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    done = bash(script, pretrained / "checkpoints/step-00000020", "--data", sentences, "--run_dir", run, *common)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "result.json").read_text())
    assert (record["method"], record["task"]) == (METHOD_OF[script.stem], "classification")
    accuracy = next(iter(record["metrics"]["accuracy"]["valid"].values()))
    assert f"{accuracy:.4f}" in done.stdout and "n = 11" in done.stdout
    assert (run / "slimming.png").exists()


def test_a_run_that_is_not_there_is_one_line(sentences, tmp_path):
    done = bash(
        SCRIPTS[0], tmp_path / "nothing", "--scale", "smoke", "--data", sentences, "--run_dir", tmp_path / "run"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing" in done.stderr
