"""Every script at smoke scale, as a user would call it: trains, prints its table, draws its plot."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "script" / "table1").glob("*.sh") if path.stem != "all")
METHOD_OF = {
    "smoe_dropout": "smoe_dropout",
    "directly_dense_training": "dense_dropout",
    "concrete_dropout": "dense_concrete_dropout",
    "dropblock": "dense_dropblock",
    "thor": "thor",
    "smoe": "smoe",
}


def bash(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, argv)], capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_there_is_a_script_for_every_row():
    assert {script.stem for script in SCRIPTS} == METHOD_OF.keys()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs_to_its_table_and_plot(script, data_dir, tmp_path, quick_bash):
    run = tmp_path / "run"
    # One of them with a Python of its own, as a user has it.
    done = (bash if script.stem == "smoe_dropout" else quick_bash)(
        script, "--scale", "smoke", "--data", data_dir, "--run_dir", run, "--progress", "false"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["method"] == METHOD_OF[script.stem]
    last = list(result["metrics"]["bpc"]["test"].values())[-1]
    assert f"{last:.4f}" in done.stdout.splitlines()[-4], done.stdout  # above "learning curve: " and "figure: "
    assert (run / "curve.png").is_file()
    assert (run / "slimming.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("model", "script"), [("bert", "smoe_dropout"), ("roberta", "directly_dense_training")])
def test_bert_script_runs_to_its_table_and_plot(model, script, prepared, tmp_path, quick_bash):
    """The other ten differ in a flag that test_panel_points.py checks."""
    flags = ("--scale", "smoke", "--data", prepared(model), "--run_dir", tmp_path / "run", "--progress", "false")
    # One of them with a Python of its own, which must not pass on what packages have to say to each other.
    done = (bash if model == "bert" else quick_bash)(ROOT / "script/table1" / model / f"{script}.sh", *flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["model"], result["method"]) == (model, METHOD_OF[script])
    last = list(result["metrics"]["bits_per_masked_token"]["test"].values())[-1]
    assert f"{last:.4f}" in done.stdout and (tmp_path / "run" / "slimming.png").is_file()


def test_default_run_folder_is_named_after_the_flags_and_a_second_call_goes_on(data_dir, tmp_path, quick_bash):
    # The flags make the folder: another seed is another run.
    flags = [
        "--scale",
        "smoke",
        "--data",
        data_dir,
        "--progress",
        "false",
        "--steps",
        "2",
        "--seed",
        tmp_path.stat().st_ino,
    ]
    first = quick_bash(ROOT / "script/table1/smoe_dropout.sh", *flags)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.split("figure: ")[1].strip()).parent
    try:
        assert folder.parts[:3] == ("runs", "table1", "smoe_dropout") and "scale-smoke" in folder.name
        again = quick_bash(ROOT / "script/table1/smoe_dropout.sh", *flags)
        assert again.returncode == 0 and "is finished" in again.stdout
    finally:
        import shutil

        shutil.rmtree(ROOT / folder)


def test_bad_input_reaches_the_user_as_one_line(tmp_path):
    done = bash(ROOT / "script/table1/thor.sh", "--scale", "smoke", "--k_max", "99", "--run_dir", tmp_path / "run",
                "--data", tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: k_max is 99") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--source=books"], ["--source", "books"]])
def test_a_text_is_looked_for_where_the_script_is_called(words, tmp_path):
    (tmp_path / "books").mkdir()  # without text: nothing is prepared
    script = ROOT / "script/table1/bert/smoe.sh"
    command = ["bash", str(script), "--scale", "smoke", "--run_dir", str(tmp_path / "run"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"file in {tmp_path}/books" in done.stderr and done.stderr.count("\n") == 1
