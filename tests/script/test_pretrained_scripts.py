"""The scripts of a pretrained encoder at smoke scale: adapted, then fine-tuned."""

import json
from pathlib import Path

import pytest
from example_data import write_sentences

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "script" / "pretrained"
METHOD_OF = {"dense_model": "dense_dropout", "smoe_dropout": "smoe_dropout"}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_OF)
def test_an_encoder_is_adapted_and_fine_tuned(name, hf_folder, prepared, quick_bash, tmp_path):
    folder, _ = hf_folder("bert", whole=False)
    adapted, run = tmp_path / "adapted", tmp_path / "run"
    common = ["--scale", "smoke", "--progress", "false", "--sweep", "16"]
    flags = ["--start_from", folder, "--data", prepared("bert"), "--run_dir", adapted, *common]
    done = quick_bash(SCRIPTS / f"{name}.sh", *flags, "--steps", 4, "--eval_interval", 4, "--batch_size", 4)
    assert done.returncode == 0, done.stderr
    record = json.loads((adapted / "result.json").read_text())
    assert (record["method"], record["config"]["d_model"], record["config"]["seq_len"]) == (METHOD_OF[name], 32, 64)
    assert record["config"]["dropout"] == 0 and record["config"]["residual_dropout"] == 0.1
    data = write_sentences(tmp_path / "sst2", {"train": 40, "valid": 11})
    flags = [adapted, "--data", data, "--run_dir", run, *common]
    done = quick_bash(SCRIPTS / "sst2" / f"{name}.sh", *flags, "--steps", 4, "--eval_interval", 4, "--seq_len", 128)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "result.json").read_text())
    assert (record["method"], record["model"], record["task"]) == (METHOD_OF[name], "bert", "classification")
    assert "n = 11" in done.stdout and (run / "predictions.jsonl").exists()


def test_without_an_encoder_it_says_so(quick_bash):
    done = quick_bash(SCRIPTS / "smoe_dropout.sh", "--scale", "smoke")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --start_from is missing") and done.stderr.count("\n") == 1
