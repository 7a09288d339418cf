"""Every benchmark can be imported, and the builders of a training step follow the trainers' configurations."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import step

PROGRAMS = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("method", ["dense_dropout", "smoe_dropout"])
@pytest.mark.parametrize("build", ["transformer_xl", "bert", "roberta"])
def test_a_step_is_built_at_the_papers_size(build, method):
    """On shapes alone: its FLOPs grow with k, and its dropout rate is that of every dropout in the model."""
    with torch.device("meta"):
        if build == "transformer_xl":
            model, _, _, flops = step.transformer_xl(2, 16, method, 0.25, "meta")
        else:
            model, _, _, flops = step.masked_lm(build, method, 0.25, "meta")
        assert {module.p for module in model.modules() if "Dropout" in type(module).__name__} - {0.0} == {0.25}
        assert flops(None) > 0 if method == "dense_dropout" else flops(16) > flops(8) > 0


def test_every_method_takes_steps_and_its_flops_are_those_of_its_training(tmp_path, monkeypatch, capsys):
    from benchmarks import methods
    from smoe.methods import METHODS
    from smoe.report.costs import read_step_times

    file = tmp_path / "step_times.json"
    options = ["--scale", "smoke", "--model", "transformer_xl", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["methods", *options])
    methods.main()
    rows, problems = read_step_times(tmp_path)
    assert problems == [] and {row["scale"] for row in rows} == {"smoke"}
    trained = {row["method"]: row for row in rows if row["as_trained"]}
    assert list(trained) == list(METHODS)
    assert {name: row["k"] for name, row in trained.items() if METHODS[name].routed} == {
        "thor": 2,
        "smoe": 2,
        "smoe_dropout": "8..16",
    }
    growing = [row for row in rows if row["method"] == "smoe_dropout" and not row["as_trained"]]
    assert [row["k"] for row in growing] == [8, 12, 16]
    for name in ("seconds_per_step", "flops_per_step"):
        mean = sum(share * row[name] for share, row in zip((0.25, 0.5, 0.25), growing, strict=True))
        assert trained["smoe_dropout"][name] == pytest.approx(mean)
    assert trained["dense_dropout"]["flops_per_step"] > trained["smoe"]["flops_per_step"]
    assert trained["thor"]["flops_per_step"] > 1.5 * trained["smoe"]["flops_per_step"]  # two passes
    assert capsys.readouterr().out.count("transformer_xl") == len(rows)


@pytest.mark.parametrize("name", ["minilm", "gpt2"])
def test_few_tokens_compares_the_same_mlps(name):
    """At k = N both contenders compute the same, the whole model and the MLPs alone."""
    import copy
    import time

    import smoe
    from benchmarks import few_tokens
    from smoe.control import smoe_layers

    dense = few_tokens.build(name, num_layers=2, d_model=48)
    experts = smoe.modulize(copy.deepcopy(dense), few_tokens.NUM_EXPERTS, score="sum")
    x, ids = torch.randn(1, 3, 48), torch.arange(3)[None]
    with torch.no_grad():
        torch.testing.assert_close(dense(ids)[0], experts(ids)[0], atol=1e-5, rtol=0)
        for mlp, (_, layer) in zip(few_tokens.dense_mlps(dense), smoe_layers(experts), strict=True):
            torch.testing.assert_close(mlp(x), layer(x), atol=1e-5, rtol=0)
    for part in few_tokens.PARTS:
        record = few_tokens.measure(dense, experts, part, 2, 1, time.perf_counter)
        assert list(record["ratio_to_dense"]) == ["dense", "k=1", "k=2", "k=4", "k=8", "k=16"]
        assert record["ratio_to_dense"]["dense"] == 1 and min(record["median_s"].values()) > 0
