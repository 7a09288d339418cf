"""Which runs all.sh of tables and figures has: the paper's points, each script in a panel, none twice."""

import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from modules import load

from bert.config import PretrainConfig
from smoe.methods import METHODS
from smoe.train.command import parse_config
from transformer_xl.config import LanguageModelConfig

ROOT = Path(__file__).parents[2]
FIGURES = ("table1", "figure1", "figure3", "figure5")
PANELS = {
    f"{figure} {panel}": [shlex.split(line) for line in lines]
    for figure in FIGURES
    for panel, lines in load("panel_runs", "script/panel_runs.py").read_panels(figure).items()
}
BERTS = [tuple(line) for model in ("bert", "roberta") for line in PANELS.pop(f"table1 {model}")]
POINTS = {tuple(line) for lines in PANELS.values() for line in lines}
SCALES = [scale for scale in yaml.safe_load(LanguageModelConfig.scales_file.read_text()) if scale != "smoke"]


@functools.cache
def config_of(name: str, *flags: str, config_class: type = LanguageModelConfig) -> LanguageModelConfig | PretrainConfig:
    """What the trainer makes of the flags that the script gives it."""
    command = ["bash", ROOT / "script" / f"{name}.sh", *flags]
    shown = subprocess.run(command, env={**os.environ, "SHOW_FLAGS": "1"}, capture_output=True, text=True, check=True)
    return parse_config(config_class, shown.stdout.splitlines())


def test_every_script_is_a_point_of_a_panel_and_is_listed():
    scripts = {path.relative_to(ROOT / "script") for name in FIGURES for path in (ROOT / "script" / name).glob("*.sh")}
    points = {str(path.with_suffix("")) for path in scripts if path.stem != "all"}
    assert points == {name for name, *_ in POINTS}
    named = re.findall(r"`(script/[\w{},./-]+)`", (ROOT / "README.md").read_text())  # some with {one,other}
    expanded = subprocess.run(["bash", "-c", f"echo {' '.join(named)}"], capture_output=True, text=True, check=True)
    listed = {path.removeprefix("script/") for path in expanded.stdout.split()}
    assert sorted(str(path) for path in scripts if str(path) not in listed) == []
    assert [path for path in sorted(listed) if not (ROOT / "script" / path).exists()] == []
    assert all(os.access(ROOT / "script" / path, os.X_OK) for path in scripts)
    for name in ("8layers_smoe_dropout", "12layers_smoe_dropout"):  # as in the official release
        assert f"figure5/{name}" in points


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_is_the_model_that_panels_start_from(scale):
    """Figure 5 says 4 layers and 16 experts without a flag that says so."""
    config = config_of("table1/smoe_dropout", "--scale", scale)
    assert (config.num_layers, config.num_experts, config.layers, config.k_schedule()) == (
        4,
        16,
        "all",
        (8, 16, "linear"),
    )
    assert config.d_hidden % 16 == 0


def by_panel(panel: str, *fields: str) -> set[tuple]:
    configs = [config_of(*line, "--scale", "paper") for line in PANELS[panel]]
    return {(config.method, *(getattr(config, field) for field in fields)) for config in configs}


def test_panels_are_the_papers():
    three = ("dense_dropout", "smoe", "smoe_dropout")
    dense = {("dense_dropout", width) for width in (512, 1024, 2048, 4096, 8192)}
    assert by_panel("figure1 figure1", "d_hidden") == {("smoe", 8192), ("smoe_dropout", 8192)} | dense
    others = {(name, 8192) for name in ("thor", "dense_concrete_dropout", "dense_dropblock")}
    assert by_panel("figure3 figure3", "d_hidden") == by_panel("figure1 figure1", "d_hidden") | others
    assert by_panel("table1 transformer_xl", "output_scale") == {
        ("smoe_dropout", "k"),
        ("smoe_dropout", "num_experts"),
        *((name, 1) for name in (*three, "thor", "dense_concrete_dropout", "dense_dropblock")),
    }
    assert by_panel("figure5 a", "num_layers") == {(name, depth) for name in three for depth in (2, 4, 8, 12)}
    assert all(
        len(config_of(*line, "--scale", "paper").smoe_layers()) in (0, 2, 4, 8, 12) for line in PANELS["figure5 a"]
    )
    assert by_panel("figure5 b", "d_hidden", "num_experts") == {
        (name, 512 * n, 16 if name == "dense_dropout" else n) for name in three for n in (2, 4, 8, 16)
    }
    assert by_panel("figure5 c", "router") == {("smoe_dropout", router) for router in (None, "uniform", "hash")}
    ks = {config_of(*line, "--scale", "paper").k_schedule() for line in PANELS["figure5 d"]}
    assert ks == {(8, 16, "linear"), (8, 8, "constant"), (2, 2, "constant")}
    layers = [config_of(*line, "--scale", "paper").smoe_layers() for line in PANELS["figure5 e"]]
    assert layers == [[0, 1], [1, 2], [2, 3], [1, 3]]
    drawn = {(c.method, *c.k_schedule()) for c in (config_of(*x, "--scale", "paper") for x in PANELS["figure5 beyond"])}
    modes = ("random", "random_per_layer")
    assert drawn == {(name, 1, 16, mode) for name in three[1:] for mode in modes} | {("smoe", 8, 16, "linear")}


def test_no_two_scripts_train_the_same():
    """Else one training would be paid twice."""
    configs = {point: dataclasses.replace(config_of(*point, "--scale", "paper"), run_dir="x") for point in POINTS}
    assert len(set(map(str, configs.values()))) == len(configs) > 35


@pytest.mark.parametrize("point", sorted(POINTS), ids="-".join)
def test_a_point_can_be_built_at_smoke_scale(point):
    assert config_of(*point, "--scale", "smoke").smoe_layers() is not None


def test_table1_has_all_methods_of_bert_and_roberta():
    configs = [
        config_of(*point, "--scale", "paper", "--seed", "2", "--source", "a", "b", config_class=PretrainConfig)
        for point in BERTS
    ]
    assert len(configs) == 12 and len(set(BERTS)) == 12
    assert {(config.model, config.method) for config in configs} == {
        (model, method) for model in ("bert", "roberta") for method in METHODS
    }
    # Without the text, which a fine-tuning of the run need not name again.
    assert configs[0].run_dir == "runs/table1/bert/smoe_dropout/scale-paper_seed-2"


def test_newlines_choose_the_data_and_the_run_folder():
    flags = ("table1/smoe_dropout", "--newlines", "drop", "--seed", "3")
    assert config_of(*flags).data == "data/enwik8-no-newlines"
    assert config_of(*flags).run_dir == "runs/table1/smoe_dropout/newlines-drop_seed-3"
    assert config_of(flags[0], "--newlines=keep").data == config_of(flags[0]).data == "data/enwik8"
    for wrong, word in (
        (["--newlines", "no"], "keep or drop"),
        (["--newlines", "drop", "--data", "x"], "--data names"),
    ):
        done = subprocess.run(["bash", ROOT / "script/table1/smoe.sh", *wrong], capture_output=True, text=True)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1


def test_a_run_on_other_text_is_told_apart(tmp_path):
    """Its folder is the same: --source is not in the name."""
    panel_runs = load("panel_runs", "script/panel_runs.py")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "book.txt").write_text(f"{name}. " * 50)
    from data.bookcorpus.corpus import from_files, text_files

    origin = from_files(text_files([tmp_path / "a"])[0], "text").origin
    (tmp_path / "result.json").write_text(json.dumps({"dataset": {"name": "text", "origin": origin}}))

    def run(name, *flags):
        return panel_runs.Run(name, ("--seed", "1", *map(str, flags)), ("--run_dir", str(tmp_path)))

    assert not panel_runs.other_source(run("table1/bert/smoe", "--source", tmp_path / "a", "--scale", "cpu"))
    assert not panel_runs.other_source(run("table1/bert/smoe"))
    assert not panel_runs.other_source(run("table2/csqa/bert/smoe", "--source", tmp_path / "b"))  # a data set's folder
    other = "is a run on other text than --source names"
    assert panel_runs.other_source(run("table1/roberta/smoe", "--source", tmp_path / "b")) == other
    assert panel_runs.other_source(run("table1/bert/smoe", f"--source={tmp_path / 'a'}", tmp_path / "b")) == other

    def task(*flags):
        all_flags = ("--run", str(tmp_path), "--run_dir", str(tmp_path / "task"))
        return panel_runs.Run("pretrained/csqa/smoe_dropout", tuple(map(str, flags)), all_flags)

    (tmp_path / "config.yaml").write_text(f"start_from: {tmp_path / 'a'}\n")
    same = ("--start_from", tmp_path / "a", "--text", tmp_path / "a")
    assert panel_runs.other_source(task(*same)) is None
    assert panel_runs.other_source(task(*same, "--source", tmp_path / "b")) is None  # CSQA's
    assert "--text" in panel_runs.other_source(task(*same[:2], f"--text={tmp_path / 'b'}"))
    found = panel_runs.other_source(task("--start-from", tmp_path / "b", *same[2:]))
    assert found == f"starts from the encoder in {tmp_path / 'a'}, not from {tmp_path / 'b'}"


def test_a_run_on_other_questions_is_told_apart(tmp_path):
    """HotpotQA may be any questions in its format; the folder is the same."""
    panel_runs = load("panel_runs", "script/panel_runs.py")
    data, mine, parts = tmp_path / "data", tmp_path / "mine.json", {}
    data.mkdir()
    mine.write_text("[]")
    for split in ("train", "test", "multi_hop", "single_hop"):
        (data / f"{split}.jsonl").write_text("{}\n")
        parts[split] = {"file": f"{split}.jsonl", "bytes": 3}
    parts["multi_hop"]["named_sha256"] = None
    (data / "meta.json").write_text(json.dumps({"sha256": "aa", "source": str(mine), "splits": parts}))

    def found(*flags, sha256="aa"):
        (tmp_path / "result.json").write_text(json.dumps({"dataset": {"name": "hotpotqa", "sha256": sha256}}))
        all_flags = ("--data", str(data), "--run_dir", str(tmp_path))
        return panel_runs.other_source(panel_runs.Run("tablea6/smoe", (*map(str, flags), "--seed", "1"), all_flags))

    assert found("--source", mine) is None and found(f"--source={tmp_path}/x/../mine.json") is None
    assert found() is None and found(sha256="bb") is None  # whichever they were
    assert found("--source", mine, sha256="bb") == "is a run on other questions than --source and --subquestions name"
    other = tmp_path / "others.json"
    for flag in ("--source", "--subquestions"):
        message = f"is compared with {flag} {other} only after python data/hotpotqa/prepare.py {flag} {other}"
        assert found(flag, other) == message


@pytest.mark.slow
def test_a_second_call_with_a_text_is_compared_with_the_finished_run(tmp_path):
    """In a process of its own, as all.sh starts it: pytest has the checkout's folders on its path anyway."""
    text, runs = tmp_path / "text", tmp_path / "runs"
    text.mkdir()
    (text / "book.txt").write_text("Once. " * 50)
    flags = ("--scale", "smoke", "--source", str(text))
    config = config_of("table1/bert/smoe", *flags, config_class=PretrainConfig)
    folder = runs / Path(config.run_dir).relative_to("runs")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1}))
    from data.bookcorpus.corpus import from_files, text_files

    dataset = {"name": "text", "origin": from_files(text_files([text])[0], "text").origin}
    seconds = {"training": 1, "sweep": 1}
    (folder / "result.json").write_text(json.dumps({"dataset": dataset, "seconds": seconds}))

    def state():
        options = ["table1", "--only", "table1/bert/smoe", *flags, "--dry_run"]
        command = [sys.executable, ROOT / "script/panel.py", *options]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["RUNS_DIR"] = str(runs)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()[0]

    assert state() == "finished"
    (text / "book.txt").write_text("Twice. " * 50)
    assert state() == "changed"


def test_records_are_named_after_flags_but_not_after_places(tmp_path):
    panel, panel_runs = load("panel", "script/panel.py"), load("panel_runs", "script/panel_runs.py")
    words = ["--keep", "4", "--start-from=/x/MiniLM/", "--text", "a", "b", "--layers", "0", "2", "--seed", "1"]
    assert panel_runs.given_flags(words) == [
        ("keep", ["4"]), ("start_from", ["/x/MiniLM/"]), ("text", ["a", "b"]), ("layers", ["0", "2"]), ("seed", ["1"])
    ]  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps({"scale": "cpu", "seed": 1}))
    run = panel_runs.Run("pretrained/csqa/smoe_dropout", tuple(words), ("--run_dir", str(tmp_path)))
    panel.collect(run, tmp_path / "results")
    (record,) = (tmp_path / "results").rglob("*.json")
    name = "smoe_dropout_keep_4_start_from_MiniLM_layers_0_2-seed1.json"
    assert record == tmp_path / "results" / "pretrained" / "cpu" / "csqa" / name
