"""Tables A4 and A5: which runs they are made of; and the one script of their own, at smoke scale."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from example_data import write_sentences
from modules import load

ROOT = Path(__file__).parents[2]
runs = load("panel_runs", "script/panel_runs.py")


def test_table_a4_is_table_2_with_three_seeds(tmp_path):
    own, table2 = runs.read_panels("tablea4"), runs.read_panels("table2")
    for setting, lines in own.items():
        assert sorted(lines) == sorted(line for line in table2[setting] if line.startswith("table2/sst2/"))
    command = ["bash", ROOT / "script/tablea4/all.sh", "--panel", "paper", "--scale", "cpu", "--only", "smoe"]
    environment = {**os.environ, "RUNS_DIR": str(tmp_path)}
    shown = subprocess.run([*map(str, command), "--dry_run"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    *lines, last = shown.stdout.splitlines()
    assert [line.split("--seed ")[1] for line in lines] == ["1", "2", "3"] and last.startswith("0 of 3 finished")


def test_table_a5_has_every_budget_of_its_three_rows():
    for setting, lines in runs.read_panels("tablea5").items():
        rows = ("table2/sst2/smoe", "table2/sst2/smoe_dropout", "tablea5/growing_k_smoe")
        budgets = ("", *(f" --keep {k}" for k in (1, 2, 4, 8)))
        assert sorted(lines) == sorted(f"{row} --setting {setting}{budget}" for row in rows for budget in budgets)


def test_the_learned_router_with_growing_k_starts_from_figure_5s_run(tmp_path, monkeypatch):
    from argparse import Namespace

    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    options = Namespace(figure="tablea5", panel=["paper"], only=["growing_k_smoe"], scale="cpu", seeds=[2])
    whole, *kept = runs.chosen_runs(options, [])
    given = dict(zip(whole.all_flags[::2], whole.all_flags[1::2], strict=True))
    first = runs.trainer_flags("figure5/growing_k_smoe", ["--scale", "cpu", "--seed", "2"])
    assert given["--run"] == first[first.index("--run_dir") + 1] and given["--epochs"] == "3"
    assert given["--run"].startswith(f"{tmp_path}/figure5/growing_k_smoe/")
    assert whole.folder == tmp_path / "tablea5/growing_k_smoe/setting-paper_scale-cpu_seed-2"
    assert len(kept) == 4 and runs.config_class(whole).__name__ == "ClassifyConfig"


@pytest.mark.slow
def test_script_fine_tunes_the_experts_it_keeps(start, data_dir, quick_bash, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    common = ["--scale", "smoke", "--progress", "false"]
    flags = ["--method", "smoe", "--schedule", "linear", "--k_min", 8, "--k_max", 16, "--sweep", 16]
    trained = start("transformer_xl.train", *common, *flags, "--data", data_dir, "--run_dir", pretrained)
    assert trained.wait() == 0, trained.err
    data = write_sentences(tmp_path / "sst2", {"train": 40, "valid": 11})
    flags = ["--keep", 4, "--data", data, "--run_dir", run]
    done = quick_bash(ROOT / "script/tablea5/growing_k_smoe.sh", pretrained, *common, *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "result.json").read_text())
    assert record["pretrained"]["k_schedule"] == [8, 16, "linear"] and record["pretrained"]["num_experts"] == 16
    assert (record["method"], record["config"]["num_experts"]) == ("smoe", 4)
