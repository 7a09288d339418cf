"""docs/ship.md as it stands: its Python runs, its commands are ours, its tables are those of results/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOC = (ROOT / "docs/ship.md").read_text()


def test_its_python_runs_from_the_page_alone(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    import torch

    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    with pytest.warns(UserWarning, match="the dense model will compute something else"):
        for block in re.findall(r"```python\n(.*?)```", DOC, flags=re.S):
            exec(compile(block, "docs/ship.md", "exec"), scope)
            if "AutoModelForCausalLM.from_pretrained" in block:
                loaded = scope["native"] if "native =" in block else scope["model"]
                with torch.no_grad(), scope["smoe"].activated(first := scope.setdefault("first", scope["model"]), 4):
                    ids = torch.arange(12)[None]
                    torch.testing.assert_close(loaded(ids).logits, first.eval()(ids).logits, atol=1e-5, rtol=0)
    assert type(scope["native"]).__name__ == "MixtralForCausalLM"
    assert scope["model"].model.layers[0].mlp.down_proj.in_features == 512


def test_its_command_is_ours(tmp_path):
    from smoe.cli import _build_parser

    (command,) = re.findall(r"smoe (export .*)", DOC)
    options = _build_parser().parse_args(command.split())
    assert (options.path, options.out, options.k) == ("run", "hf", 8)


def _row(name: str, values: list[str]) -> str:
    return f"| {name} | " + " | ".join(values) + " |\n"


def test_its_tables_are_the_records():
    record = json.loads((ROOT / "results/llama_bytes.json").read_text())
    for name in ("smoe", "exported"):
        assert _row(name, [f"{value:.4f}" for value in record[name].values()]) in DOC
        assert list(record[name]) == ["1", "2", "4", "8", "16"]
    record = json.loads((ROOT / "results/gguf.json").read_text())
    rows = record["by_k"]
    assert [row["k"] for row in rows] == [1, 2, 4, 8, 16] and record["same_tokenization"]
    assert max(row["mean_difference"] for row in rows) < 0.02
    assert _row("mean difference", [f"{row['mean_difference']:.6f}" for row in rows]) in DOC
    for name, field in (("generating", "generate"), ("reading a prompt", "prompt")):
        assert _row(name, [f"{row[f'{field}_tokens_per_second']:.0f}" for row in rows]) in DOC
