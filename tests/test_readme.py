"""The documents as they stand: their Python runs, the files they name exist, README's numbers are those of results/."""

import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from runs import assert_close_runs

from smoe.report import read_result, slimming_table, with_block
from smoe.report.command import part_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs/extend.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
BLOCKS = re.findall(r"```python\n(.*?)```", EXTEND, flags=re.S)
# The example of a task is a module with a main; the other blocks stand alone.
EXAMPLES = [block for block in BLOCKS if "__main__" not in block]
FOLDERS = "script|data|docs|examples|Figs|results|benchmarks|smoe|transformer_xl|bert|tests"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.S))
def test_python_runs_as_it_stands(block):
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    smoe, model = scope["smoe"], scope["model"]
    assert smoe.get_top_k(model) == 4 and len(smoe.smoe_layers(model)) == 2


@pytest.mark.parametrize("block", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_how_to_extend_run(block):
    exec(compile(block, "docs/extend.md", "exec"), {})


@pytest.mark.slow
def test_the_example_of_a_task_trains_and_is_reported(tmp_path, start, start_ranks):
    (module,) = (block for block in BLOCKS if "__main__" in block)
    (scales,) = re.findall(r"```yaml\n(.*?)```", EXTEND, flags=re.S)
    (tmp_path / "majority.py").write_text(module)
    (tmp_path / "majority.yaml").write_text(scales)
    path = {"PYTHONPATH": str(tmp_path)}

    def run(*arguments):
        command = start(*arguments, env=path)
        assert command.wait() == 0, command.err
        return command.out

    run("majority", "--method", "smoe_dropout", "--scale", "smoke", "--run_dir", tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    accuracy = result["metrics"]["accuracy"]
    assert result["task"] == "majority" and accuracy["n"] == {"valid": 256, "test": 256}
    assert list(accuracy["test"]) == ["1", "2", "4", "8"] and accuracy["test"]["8"] > 0.9
    assert "accuracy" in run("smoe.report", tmp_path / "run").lower()
    flags = ("--method", "smoe_dropout", "--scale", "smoke", "--dropout", "0", "--precision", "fp32", "--run_dir")
    run("majority", *flags, tmp_path / "one")
    for rank in start_ranks(2, "majority", *flags, tmp_path / "two", env={0: path, 1: path}):
        assert rank.wait() == 0, rank.err
    assert_close_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "docs/extend.md", "docs/finetune.md", "docs/ship.md", "benchmarks/README.md"],
)
def test_every_file_it_names_exists(name):
    text = (ROOT / name).read_text()
    named = {ROOT / path for path in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]*[\w/]", text)}
    named |= {(ROOT / name).parent / path for path in re.findall(r"\]\(([\w./-]+)[)#]", text)}
    named = {path for path in named if not re.search("NAME|TASK", str(path.relative_to(ROOT)))}  # placeholders
    assert sorted(str(path) for path in named if not path.exists()) == []
    assert len(named) > 3


def test_every_script_is_listed():
    """By its name, also in {braces}, or by its folder."""
    scripts = [path.relative_to(ROOT) for path in (ROOT / "script").glob("table*/**/*.sh")]
    named = re.findall(r"`(script/[\w{},./-]+)`", README)
    echoed = subprocess.run(["bash", "-c", f"echo {' '.join(named)}"], capture_output=True, text=True, check=True)
    listed = echoed.stdout.split()
    assert [str(path) for path in scripts if str(path) not in listed and f"{path.parent}/" not in listed] == []
    assert len(scripts) >= 46


@pytest.mark.parametrize("line", [line for line in BASH.splitlines() if " --" in line and "table1" in line])
def test_flags_of_the_script_lines_are_the_trainers(line, tmp_path):
    from smoe.train.command import parse_config
    from transformer_xl.config import LanguageModelConfig

    flags = shlex.split(line.partition("#")[0])[2:]
    parse_config(LanguageModelConfig, ["--method", "smoe_dropout", "--run_dir", str(tmp_path), *flags])


RECORDS = {"cpu": 24, "cpu/bert": 6, "cpu/roberta": 6, "hour": 4, "hour/bert": 2, "hour/roberta": 2}


@pytest.mark.parametrize("folder, count", RECORDS.items())
def test_tables_are_made_of_the_kept_results(folder, count):
    records = sorted((ROOT / "results" / "table1" / folder).glob("*.json"))
    assert len(records) == count
    table = slimming_table([read_result(record) for record in records])
    block = f"table1-{folder.replace('/', '-')}"
    assert with_block(README, block, table) == README, "run script/report.sh"


@pytest.mark.parametrize("name", ["smoe_dropout-seed1", "bert/smoe_dropout-seed1", "roberta/smoe_dropout-seed1"])
def test_smoe_dropout_slims_in_the_kept_results(name):
    """The property itself: test BPC does not rise from a k to the next larger one by more than 0.005."""
    record = read_result(ROOT / f"results/table1/cpu/{name}.json")
    measured = record["metrics"][record["metric"]]["test"]
    values = [measured[k] for k in sorted(measured, key=int)]
    assert len(values) == 6
    assert all(later <= earlier + 0.005 for earlier, later in zip(values, values[1:], strict=False))


def test_the_drawing_is_what_its_script_writes():
    drawing = runpy.run_path(str(ROOT / "Figs/framework.py"))["drawing"]
    assert drawing() == (ROOT / "Figs/framework.svg").read_text(encoding="utf-8"), "run python Figs/framework.py"
    ElementTree.fromstring(drawing())  # it is XML


@pytest.mark.parametrize(
    ("document", "part"), [("README.md", "table2"), ("README.md", "encoder"), ("docs/pretrained.md", "encoder")]
)
def test_tables_of_fine_tuning_are_those_of_the_records(document, part):
    written, text = (ROOT / document).read_text(encoding="utf-8"), part_text(part, str(ROOT / "results"))
    assert "missing" in text or "±" in text
    assert with_block(written, part, text) == written, f"{document}: run bash script/report.sh"
