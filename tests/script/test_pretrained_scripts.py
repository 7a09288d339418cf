"""The scripts of a pretrained encoder at smoke scale: adapted, then fine-tuned."""

import json
import os
import shlex
import shutil
import uuid
from pathlib import Path

import pytest
import yaml
from books import stories
from example_data import write_sentences
from modules import load

import benchmarks.encoder
from smoe.report.costs import read_encoder_times
from smoe.train.command import parse_config

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "script" / "pretrained"
TASKS = ("sst2", "csqa", "asdiv_a", "mawps", "svamp")
METHOD_OF = {"dense_model": "dense_dropout", "smoe_dropout": "smoe_dropout"}


@pytest.mark.slow
def test_a_dense_encoder_is_adapted_and_fine_tuned(hf_folder, prepared, quick_bash, tmp_path):
    name, (folder, _) = "dense_model", hf_folder("bert", whole=False)
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


@pytest.fixture
def encoder(hf_folder, tmp_path):
    """A folder with a name of its own, since the text that is prepared for it goes by that name."""
    folder, _ = hf_folder("bert", whole=False)
    own = shutil.copytree(folder, tmp_path / f"encoder-{uuid.uuid4().hex}")
    yield own
    shutil.rmtree(ROOT / "data" / "bookcorpus" / f"{own.name}-smoke-64", ignore_errors=True)


@pytest.mark.slow
def test_the_encoder_is_adapted_first_and_only_once(encoder, quick_bash, tmp_path, monkeypatch):
    data, text = write_sentences(tmp_path / "sst2", {"train": 40, "valid": 11}), tmp_path / "books"
    text.mkdir()
    for i, story in enumerate(stories(10)):
        (text / f"{i}.txt").write_text(story)
    flags = ["--start_from", encoder, "--text", text, "--data", data, "--scale", "smoke", "--seed", 1]
    flags += ["--steps", 4, "--eval_interval", 4, "--seq_len", 128, "--progress", "false"]
    written, script = [], SCRIPTS / "sst2" / "smoe_dropout.sh"
    for own in ([], ["--keep", 4]):
        done = quick_bash(script, *flags, *own, RUNS_DIR=str(tmp_path / "runs"))
        assert done.returncode == 0, done.stderr
        assert "n = 11" in done.stdout
        (adapted,) = (tmp_path / "runs" / "pretrained" / "smoe_dropout").iterdir()
        written.append({file.name: file.stat().st_mtime_ns for file in adapted.iterdir()})
    assert written[0] == written[1]
    relative = os.path.relpath(encoder, ROOT)  # by another path it is the same one: the scripts are called at the root
    done = quick_bash(script, "--start_from", relative, *flags[2:], "--keep", 4, RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    other = shutil.copytree(encoder, tmp_path / "elsewhere" / encoder.name)
    done = quick_bash(script, "--start_from", other, *flags[2:], "--keep", 2, RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 2 and f"starts from the encoder in {encoder}, not from {other}" in done.stderr
    (text / "0.txt").write_text(stories(11)[-1])
    done = quick_bash(script, *flags, "--keep", 2, RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 2 and "is a run on other text than --text names" in done.stderr
    assert done.stderr.count("\nerror: ") + done.stderr.startswith("error: ") == 1
    assert adapted.name == f"from-{encoder.name}_scale-smoke_seed-1"
    runs = [*(tmp_path / "runs" / "pretrained" / "sst2" / "smoe_dropout").iterdir()]
    records = [json.loads((run / "result.json").read_text()) for run in runs]
    assert sorted(record["config"]["num_experts"] for record in records) == [4, 16]
    assert all((run / "predictions.jsonl").exists() for run in runs)
    assert {(record["model"], record["task"]) for record in records} == {("bert", "classification")}
    first = json.loads((adapted / "result.json").read_text())
    assert first["start_from"]["model_type"] == "bert" and first["config"]["steps"] == 20
    assert (first["method"], first["config"]["d_model"], first["config"]["seq_len"]) == ("smoe_dropout", 32, 64)
    assert first["config"]["dropout"] == 0 and first["config"]["residual_dropout"] == 0.1
    for record in records:
        started = {name: record["pretrained"][name] for name in ("start_from", "scale", "seed")}
        assert started == {"start_from": encoder.name, "scale": "smoke", "seed": 1}

    options = [*map(str, runs), "--repeats", "1", "--json", str(tmp_path / "encoder_times.json")]
    monkeypatch.setattr("sys.argv", ["encoder", *options])
    benchmarks.encoder.main()
    rows, problems = read_encoder_times(tmp_path)
    assert problems == [] and {row["encoder"] for row in rows} == {encoder.name}
    places = [(row["dataset"], row["scale"], row["experts"], row["k"], row["examples"]) for row in rows]
    whole = [("sst2", "smoke", 16, k, 11) for k in (1, 2, 4, 8, 12, 16)]
    assert sorted(places) == [("sst2", "smoke", 4, 4, 11), *whole]
    assert {row["method"] for row in rows} == {"smoe_dropout"}
    sizes = {record["config"]["num_experts"]: 4e-6 * record["parameters"]["total"] for record in records}
    for row in rows:  # a file has a header beside its weights
        assert sizes[row["experts"]] < row["megabytes"] < sizes[row["experts"]] + 0.01 and row["milliseconds"] > 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHOD_OF)
def test_the_flags_of_every_script(task, name, quick_bash, tmp_path):
    flags = ["--start_from", "here/MiniLM", "--text", "books", "--setting", "all", "--scale", "cpu", "--seed", "3"]
    done = quick_bash(SCRIPTS / task / f"{name}.sh", *flags, SHOW_FLAGS="1", RUNS_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    argv = done.stdout.split("\n")[:-1]
    assert argv[:2] == ["--run", str(tmp_path / "pretrained" / name / "from-MiniLM_scale-cpu_seed-3")]
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    assert given.items() >= {"--scale": "cpu", "--seed": "3", "--patience": "4", "--data": f"data/{task}"}.items()
    assert not {"--start_from", "--text", "--setting"} & given.keys()
    assert float(given["--learning_rate"]) == (5e-5 if task in ("sst2", "csqa") else 2e-4)
    assert Path(given["--run_dir"]).parent == tmp_path / "pretrained" / task / name
    run = Path(argv[1])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"method": METHOD_OF[name], "num_layers": 2, "model": "bert"}))
    panel = load("panel_runs", "script/panel_runs.py")
    config = parse_config(panel.config_class(panel.Run(f"pretrained/{task}/{name}", (), ())), argv)
    assert (config.method, config.model, config.data) == (METHOD_OF[name], "bert", f"data/{task}")


def test_all_has_dense_and_experts_over_kept_ones_on_every_task():
    panels = load("panel_runs", "script/panel_runs.py").read_panels("pretrained")
    lines = [tuple(line.split()) for panel in panels.values() for line in panel]
    budgets = [(), *(("--keep", keep) for keep in ("4", "8", "12"))]
    folds = {task: [("--fold", str(fold)) for fold in range(5)] for task in TASKS[2:]} | {"sst2": [()], "csqa": [()]}
    expected = {
        (f"pretrained/{task}/{name}", "--setting", "all", *fold, *keep)
        for task in TASKS
        for name in METHOD_OF
        for fold in folds[task]
        for keep in (budgets if name == "smoe_dropout" else budgets[:1])
    }
    assert {*lines} == expected and len(lines) == len(expected)
    assert os.access(SCRIPTS / "all.sh", os.X_OK)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("smoe_dropout.sh", [], "error: --start_from is missing"),
        ("csqa/smoe_dropout.sh", [], "error: nothing to start from; give a run of script/pretrained/smoe_dropout.sh"),
        (
            "svamp/dense_model.sh",
            ["run", "--start_from", "x"],
            "run is given to start from, so --start_from",
        ),
        ("mawps/dense_model.sh", ["run", "--text", "x"], "run is given to start from, so --start_from"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(script, flags, message, quick_bash):
    done = quick_bash(SCRIPTS / script, *flags, "--scale", "smoke")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_an_encoder_and_a_run_have_one_spelling(quick_bash, tmp_path):
    """A run that goes on knows them by their paths; the scripts may be called from anywhere."""
    (tmp_path / "here/run/checkpoints/step-00000020").mkdir(parents=True)
    (tmp_path / "encoder").mkdir()

    def shown(script, *flags, folder=tmp_path / "here"):
        command = f"cd {shlex.quote(str(folder))} && SHOW_FLAGS=1 bash {SCRIPTS / script} {shlex.join(map(str, flags))}"
        done = quick_bash("-c", command)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
        return dict(zip(words[::2], words[1::2], strict=True))

    for encoder in ("../encoder", "../encoder/", f"{tmp_path}/./here/../encoder", tmp_path / "encoder"):
        for words in (["--start_from", encoder], [f"--start-from={encoder}"]):
            given = shown("smoe_dropout.sh", *words, "--data", "x")
            assert given["--start_from"] == str(tmp_path / "encoder")
            assert Path(given["--run_dir"]).name == "from-encoder_data-x"
    inside = shown("smoe_dropout.sh", "--start_from", ".", "--data", "x", folder=tmp_path / "encoder")
    assert (inside["--start_from"], Path(inside["--run_dir"]).name) == (
        str(tmp_path / "encoder"),
        "from-encoder_data-x",
    )

    run = tmp_path / "here/run"
    for spelled in (
        "run",
        "./run/",
        "../here/run",
        run,
        "run/checkpoints/step-00000020",
        "run/checkpoints/step-00000020/",
    ):
        assert shown("sst2/smoe_dropout.sh", spelled)["--run"] == str(run)
    assert shown("sst2/smoe_dropout.sh", "step-00000020", folder=run / "checkpoints")["--run"] == str(run)
    assert shown("../table3/smoe.sh", "./run/")["--teacher"] == str(run)
