"""Table 2's scripts: the flags that each gives its trainer; and at smoke scale, as a user would call them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from example_data import write_sentences
from modules import load

from bert.math_word_problems import MathConfig
from bert.multiple_choice import MultipleChoiceConfig
from smoe.train.command import parse_config
from transformer_xl.classify import ClassifyConfig

ROOT = Path(__file__).parents[2]
TABLE2 = ROOT / "script" / "table2"
SCRIPTS = sorted(TABLE2.glob("*/**/*.sh"))
METHOD_OF = {"dense_model": "dense_dropout", "smoe_dropout": "smoe_dropout", "smoe": "smoe", "thor": "thor"}
COLUMNS = ["sst2", "csqa/bert", *(f"{task}/{m}" for task in ("asdiv_a", "mawps", "svamp") for m in ("bert", "roberta"))]


def bash(*argv: object, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", *map(str, argv)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)


def task_and_model(script: Path) -> tuple[str, str]:
    task, *model, _ = script.relative_to(TABLE2).parts
    return task, model[0] if model else "transformer_xl"


def test_there_is_a_script_for_every_row_of_every_column():
    expected = {TABLE2 / column / f"{method}.sh" for column in COLUMNS for method in METHOD_OF}
    assert {*SCRIPTS} == expected


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(TABLE2)))
@pytest.mark.parametrize("setting", ["", "paper", "all"])
def test_the_flags_of_every_script(script, setting, tmp_path):
    task, model = task_and_model(script)
    method = METHOD_OF[script.stem]
    flags = [*(["--setting", setting] if setting else []), "--scale", "cpu", "--seed", "3", "--source", "somewhere"]
    shown = bash(script, *flags, SHOW_FLAGS="1", RUNS_DIR=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    argv = shown.stdout.split("\n")[:-1]
    run = Path(argv[argv.index("--run") + 1])
    table1 = {"dense_model": "directly_dense_training"}.get(script.stem, script.stem)
    assert run == tmp_path / "table1" / ("" if task == "sst2" else model) / table1 / "scale-cpu_seed-3"
    run.mkdir(parents=True)
    recorded = {"method": method, "num_layers": 2} | ({} if task == "sst2" else {"model": model})
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    config_class = {"sst2": ClassifyConfig, "csqa": MultipleChoiceConfig}.get(task, MathConfig)
    config = parse_config(config_class, argv)
    assert (config.method, config.scale, config.seed, config.data) == (method, "cpu", 3, f"data/{task}")
    assert config.run_dir.startswith(str(tmp_path / "table2" / script.relative_to(TABLE2).with_suffix("")))
    if setting == "paper":
        assert (config.epochs, config.batch_size) == (3, 64)
        assert config.learning_rate == (1e-4 if task == "sst2" else 2e-5)
    if setting == "all":
        assert config.patience == 4 and config.epochs is None and (task == "sst2" or config.steps == 1200)
    else:
        assert config.patience is None
    if config_class is MathConfig:
        fold = {"svamp/bert": "4", "svamp/roberta": "1"}.get(f"{task}/{model}", "0")
        assert config.fold == (fold if setting == "paper" else "0")


def test_all_has_every_cell_in_both_settings():
    panel = load("panel_runs", "script/panel_runs.py")
    panels = panel.read_panels("table2")
    cells = {f"table2/{column}/{method}" for column in COLUMNS for method in METHOD_OF}
    assert {name: len(set(lines)) for name, lines in panels.items()} == {"paper": 40, "all": 160, "challenge": 10}
    for name in ("paper", "all"):
        lines = [line.split() for line in panels[name]]
        assert {line[0] for line in lines} == cells and all(line[1:3] == ["--setting", name] for line in lines)
        assert {line[0] for line in lines if line[-2:] == ["--keep", "8"]} == {c for c in cells if "smoe_dropout" in c}
    folds = [line.partition("--fold ")[2] for line in panels["all"] if line.startswith("table2/mawps/bert/thor")]
    assert folds == ["0", "1", "2", "3", "4"]
    assert panel.expanded("a{b,c} d{e,f}g") == ["ab deg", "ab dfg", "ac deg", "ac dfg"]
    for name, expected in (
        ("table1/smoe", "LanguageModelConfig"),
        ("table2/sst2/smoe", "ClassifyConfig"),
        ("table2/csqa/bert/smoe", "MultipleChoiceConfig"),
        ("table2/svamp/bert/smoe", "MathConfig"),
    ):
        assert panel.config_class(panel.Run(name, (), ())).__name__ == expected


def test_figure_4_has_every_method_of_every_column_over_the_kept_experts():
    panels = load("panel_runs", "script/panel_runs.py").read_panels("figure4")
    budgets = [(), *(("--keep", str(keep)) for keep in (1, 2, 4, 8, 12))]
    assert list(panels) == ["sst2", "csqa", "math", "sst2_all", "csqa_all", "math_all"]
    for panel, lines in panels.items():
        task, _, setting = panel.partition("_")
        columns = [column for column in COLUMNS if column.split("/")[0] == task or task == "math" and "/" in column]
        columns = [column for column in columns if task == "csqa" or not column.startswith("csqa")]
        folds = [("--fold", str(fold)) for fold in range(5)] if panel == "math_all" else [()]
        expected = {
            (f"table2/{column}/{method}", "--setting", setting or "paper", *fold, *budget)
            for column in columns
            for method in METHOD_OF
            for fold in folds
            for budget in (budgets if method != "dense_model" else budgets[:1])
        }
        found = [tuple(line.split()) for line in lines]
        assert expected and set(found) == expected and len(found) == len(expected)
    assert os.access(ROOT / "script/figure4/all.sh", os.X_OK)


def test_a_users_flag_wins_over_the_settings():
    script = TABLE2 / "svamp/bert/thor.sh"
    done = bash(script, "--setting", "paper", "--fold", "challenge", "--epochs", 5, SHOW_FLAGS="1")
    flags = done.stdout.split("\n")
    last = {name: flags[len(flags) - flags[::-1].index(name)] for name in ("--fold", "--epochs", "--batch_size")}
    assert last == {"--fold": "challenge", "--epochs": "5", "--batch_size": "64"}


@pytest.mark.parametrize("script", ["sst2/smoe.sh", "csqa/bert/smoe.sh"])
@pytest.mark.parametrize("setting", ["paper", "all"])
def test_a_setting_says_nothing_of_the_length_that_a_user_or_scale_smoke_decides(script, setting):
    def length(*flags):
        shown = bash(TABLE2 / script, "--setting", setting, *flags, SHOW_FLAGS="1").stdout.splitlines()
        return [(word, shown[i + 1]) for i, word in enumerate(shown) if word in ("--steps", "--epochs")]

    assert length("--steps", 100) == [("--steps", "100")]
    assert length("--scale", "cpu", "--epochs", 2) == [("--epochs", "2")]
    assert length("--scale", "smoke") == []
    assert length("--scale", "smoke", "--steps", 100) == [("--steps", "100")]
    long = {"paper": [("--epochs", "3")], "all": [("--steps", "1200")] if "csqa" in script else []}
    assert length("--scale", "cpu") == long[setting]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--setting", "long"], "error: --setting is long; it must be paper or all\n"),
        (["--data", "x", "--source", "y"], "so --source has no effect"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, message):
    done = bash(TABLE2 / "mawps/bert/smoe.sh", *flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sst2"), {"train": 40, "valid": 11})


COMMON = ["--scale", "smoke", "--progress", "false", "--sweep", "16"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_OF)
def test_script_fine_tunes_the_run_it_is_given(name, start, data_dir, sentences, tmp_path, quick_bash):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    flags = ["--method", METHOD_OF[name], "--data", data_dir, "--run_dir", pretrained, *COMMON]
    first = start("transformer_xl.train", *flags)
    assert first.wait() == 0, first.err
    script, checkpoint = TABLE2 / "sst2" / f"{name}.sh", pretrained / "checkpoints/step-00000020"
    done = quick_bash(script, checkpoint, "--data", sentences, "--run_dir", run, *COMMON)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "result.json").read_text())
    assert (record["method"], record["task"]) == (METHOD_OF[name], "classification")
    accuracy = next(iter(record["metrics"]["accuracy"]["valid"].values()))
    assert f"{accuracy:.4f}" in done.stdout and "n = 11" in done.stdout
    assert (run / "slimming.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS[1:])
def test_script_fine_tunes_a_bert(column, start, prepared, tmp_path, quick_bash):
    """With each method in turn, so that every script of a column is not run for every method."""
    method = [*METHOD_OF][COLUMNS.index(column) % 4]
    task, model = column.split("/")
    sys.path.insert(0, str(ROOT / "tests/bert"))
    import fine_tuning

    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    flags = ["--model", model, "--method", METHOD_OF[method], "--data", prepared(model), "--run_dir", pretrained]
    first = start("bert.pretrain", *flags, *COMMON)
    assert first.wait() == 0, first.err
    write = fine_tuning.write_questions if task == "csqa" else fine_tuning.write_problems
    data = write(tmp_path / task)
    script = TABLE2 / column / f"{method}.sh"
    flags = ["--setting", "paper", "--fold", "0"] if task != "csqa" else ["--setting", "paper"]
    done = quick_bash(script, pretrained, "--data", data, "--run_dir", run, *flags, *COMMON)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "result.json").read_text())
    assert (record["method"], record["model"]) == (METHOD_OF[method], model)
    assert "n = 23" in done.stdout and (record["config"]["epochs"], record["config"]["batch_size"]) == (None, 64)
    assert (run / "slimming.png").exists() and (run / "predictions.jsonl").exists()


def test_a_run_that_is_not_there_is_one_line(sentences, tmp_path, quick_bash):
    done = quick_bash(
        TABLE2 / "sst2/smoe.sh", tmp_path / "nothing", "--scale", "smoke", "--data", sentences,
        "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing" in done.stderr


@pytest.mark.parametrize(
    ("script", "recorded", "message"),
    [
        ("table2/sst2/smoe", {"method": "thor"}, "method thor; it must be smoe"),
        ("table2/csqa/bert/dense_model", {"method": "smoe", "model": "bert"}, "method smoe; it must be dense_dropout"),
        ("table2/svamp/roberta/smoe", {"method": "smoe", "model": "bert"}, "model bert; it must be roberta"),
        ("table2/sst2/smoe", {"method": "smoe", "model": "bert"}, "model bert; it must be transformer_xl"),
        ("table2/mawps/bert/smoe", {"method": "smoe"}, "model transformer_xl; it must be bert"),
        ("pretrained/sst2/smoe_dropout", {"method": "smoe"}, "model transformer_xl; it must be bert or roberta"),
        ("table3/smoe", {"method": "thor"}, "method thor; it must be smoe"),
    ],
)
def test_a_run_of_another_method_or_model_is_one_line(script, recorded, message, tmp_path):
    assert refused(script, recorded, tmp_path) == f"error: {tmp_path} has {message}\n"


def refused(script, recorded, run):
    """What a script says of the run to start from, which it can't take."""
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 1, **recorded}))
    done = bash(ROOT / "script" / f"{script}.sh", run, "--scale", "smoke")
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


@pytest.mark.parametrize("start_from", [{}, {"start_from": None}])
def test_a_run_without_a_pretrained_encoder_is_one_line(start_from, tmp_path):
    said = refused("pretrained/csqa/smoe_dropout", {"method": "smoe_dropout", "model": "bert", **start_from}, tmp_path)
    what = "was not adapted from a pretrained encoder; it must be of script/pretrained/smoe_dropout.sh"
    assert said == f"error: {tmp_path} {what}\n"


def test_a_run_of_the_scripts_method_and_model_is_taken(tmp_path):
    for script, recorded in (
        ("table2/sst2/dense_model.sh", {"method": "dense_dropout"}),
        ("tablea5/growing_k_smoe.sh", {"method": "smoe"}),
        ("tablea6/smoe.sh", {"method": "smoe", "model": "bert"}),
        (
            "pretrained/csqa/smoe_dropout.sh",
            {"method": "smoe_dropout", "model": "roberta", "start_from": "encoders/a b"},
        ),
        ("table3/dense_model.sh", {"method": "dense_dropout"}),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
        done = bash(ROOT / "script" / script, tmp_path, SHOW_FLAGS="1")
        assert done.returncode == 0 and str(tmp_path) in done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["table2/csqa/bert/smoe.sh", "table1/roberta/smoe.sh", "table3/smoe.sh"])
def test_a_mistyped_flag_is_found_before_anything_is_done(script, tmp_path, quick_bash):
    flags = ["--scale", "smoke", "--source", tmp_path / "missing", "--lerning_rate", "1"]
    done = quick_bash(ROOT / "script" / script, *flags, RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 2 and done.stderr.startswith("error: --lerning_rate") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    if script.startswith("table1"):
        done = quick_bash(ROOT / "script" / script, *flags[:-2], "--help", RUNS_DIR=str(tmp_path / "runs"))
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("usage: python -m bert.pretrain") == 1


def test_a_finished_run_is_not_pretrained_again(tmp_path):
    """It may be of a text that its script, called without --source, would not take."""
    first, run = tmp_path / "first.sh", tmp_path / "run"
    first.write_text('echo "called with $*"\n')
    command = ["bash", "-euc", f"source script/common.sh; run_first {run} {first} --seed 2"]
    for said in ("called with --seed 2\n", ""):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
        (run / "result.json").touch()
