"""The README as it stands: its Python runs, its files exist, its numbers are those of results/."""

import json
import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from smoe.report import read_result, slimming_table, with_block

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.S))
def test_python_runs_as_it_stands(block):
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    smoe, model = scope["smoe"], scope["model"]
    assert smoe.get_top_k(model) == 4 and len(smoe.smoe_layers(model)) == 2


def test_every_file_it_names_exists():
    named = set(re.findall(r"\b(?:script|data|docs|Figs|results|benchmarks)/[\w./-]*\w", README))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert len(named) > 8


def test_every_script_of_table_1_is_listed():
    scripts = {f"script/table1/{script.name}" for script in (ROOT / "script" / "table1").glob("*.sh")}
    assert scripts <= set(re.findall(r"script/[\w./-]+\.sh", README))


@pytest.mark.parametrize("line", [line for line in BASH.splitlines() if " --" in line and "table1" in line])
def test_flags_of_the_script_lines_are_the_trainers(line, tmp_path):
    from smoe.train.command import parse_config
    from transformer_xl.config import LanguageModelConfig

    flags = shlex.split(line.partition("#")[0])[2:]
    parse_config(LanguageModelConfig, ["--method", "smoe_dropout", "--run_dir", str(tmp_path), *flags])


@pytest.mark.parametrize("model, count", [("", 8), ("bert", 6), ("roberta", 6)])
def test_tables_are_made_of_the_kept_results(model, count):
    records = sorted((ROOT / "results" / "table1" / "cpu" / model).glob("*.json"))
    assert len(records) == count
    table = slimming_table([read_result(record) for record in records])
    block = f"table1-cpu-{model}" if model else "table1-cpu"
    assert with_block(README, block, table) == README, "run script/report.sh"


@pytest.mark.parametrize("model", ["", "bert/", "roberta/"])
def test_smoe_dropout_slims_in_the_kept_results(model):
    """The property itself: test BPC does not rise from a k to the next larger one by more than 0.005."""
    bpc = json.loads((ROOT / f"results/table1/cpu/{model}smoe_dropout.json").read_text())["bpc"]["test"]
    values = [bpc[k] for k in sorted(bpc, key=int)]
    assert len(values) == 6
    assert all(later <= earlier + 0.005 for earlier, later in zip(values, values[1:], strict=False))


def test_the_drawing_is_what_its_script_writes():
    drawing = runpy.run_path(str(ROOT / "Figs/framework.py"))["drawing"]
    assert drawing() == (ROOT / "Figs/framework.svg").read_text(encoding="utf-8"), "run python Figs/framework.py"
    ElementTree.fromstring(drawing())  # it is XML
