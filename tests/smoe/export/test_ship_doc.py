"""docs/ship.md as it stands: its Python runs, its commands are ours, its tables are those of results/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOC = (ROOT / "docs/ship.md").read_text()


def test_its_python_runs_from_the_page_alone(tmp_path, monkeypatch):
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
            if "activated(" in block:
                assert_rows_as_if_alone(scope, [2, 16, 4])
            if "InferenceSession(" in block:
                served, batch = scope["served"], scope["batch"]
                with torch.no_grad():
                    want = served(**batch).logits
                torch.testing.assert_close(torch.from_numpy(scope["logits"]), want, atol=1e-4, rtol=0)
            if "to_int8(" in block:
                with torch.no_grad():
                    assert torch.equal(scope["loaded"](**batch).logits, scope["served"](**batch).logits)
            if "fit_budget(" in block:
                assert [layer.top_k for _, layer in scope["smoe"].smoe_layers(scope["model"])] == scope["ks"]
    assert type(scope["native"]).__name__ == "MixtralForCausalLM"
    assert scope["model"].model.layers[0].mlp.down_proj.in_features == 512


def assert_rows_as_if_alone(scope, ks):
    """The logits of every row of ``ids`` are those of a pass of its own with its k."""
    import torch

    model, ids = scope["model"], scope["ids"]
    assert len(ids) == len(ks)
    for row, logits, k in zip(ids, scope["logits"], ks, strict=True):
        with torch.no_grad(), scope["smoe"].activated(model, k):
            torch.testing.assert_close(logits, model(row[None]).logits[0], atol=1e-5, rtol=0)


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


def test_its_tables_of_k_are_the_records():
    records = json.loads((ROOT / "results/k_per_row.json").read_text())["records"]
    assert {(r["shape"], r["dtype"], r["pass"]) for r in records} >= {("bert", "fp32", "forward")} and len(
        records
    ) == 36
    for mix in dict.fromkeys(record["k_of_rows"] for record in records):
        of_mix = [record["ratio_to_mean"] for record in records if record["k_of_rows"] == mix]
        ratios = ([ratio[name] for ratio in of_mix] for name in ("mixed", "separate", "largest"))
        assert _row(mix, [f"{min(r):.2f} to {max(r):.2f}" for r in ratios]) in DOC
        assert max(ratio["mixed"] for ratio in of_mix) <= 1.15


def test_its_table_of_budgets_is_the_record():
    rows = 0
    for run in json.loads((ROOT / "results/budget.json").read_text())["runs"]:
        for row in run["rows"]:
            rows += 1
            values = [str(row["k"]), f"{row['test_one_k']:.4f}", f"{row['test_fitted']:.4f}"]
            assert _row(run["output_scale"], [*values, ", ".join(map(str, row["fitted"]))]) in DOC
            assert row["fitted_flops"] <= row["flops"]
            # The page says so: better at small budgets, no difference to speak of near all experts.
            gain = row["test_one_k"] - row["test_fitted"]
            assert gain > 0 if row["k"] < 8 else gain > -0.002
    assert rows == 8


def test_its_table_of_graphs_is_the_record():
    records = json.loads((ROOT / "results/graphs.json").read_text())["records"]
    assert {record["k"] for record in records} == {4, 8, 16} and len(records) == 9
    for record in records:
        times = [f"{record['median_ms'][name]:.2f}" for name in ("eager", "exported", "onnx")]
        assert _row(str(record["k"]), [f"{record['sentences']} x {record['tokens']}", *times]) in DOC
        assert max(record["max_difference"].values()) < 1e-4


def test_its_table_of_int8_is_the_record():
    record = json.loads((ROOT / "results/int8.json").read_text())
    assert record["weights"] == "minilm"
    by_shape = {(r["k"], r["sentences"], r["tokens"]): r for r in record["records"]}
    names = {"float32": "float32", "linear": "linear alone", "weight_only": "weight-only", "dynamic": "dynamic"}
    for name, title in names.items():
        cells = [f"{record['bytes'][name] / 1e6:.1f} MB"]
        for k in (4, 8, 16):
            few, many = by_shape[k, 1, 24], by_shape[k, 8, 64]
            cells.append(f"{few['median_ms'][name]:.0f}, {many['median_ms'][name]:.0f} ms")
            cells[-1] += f"; {many['cosine_error'][name]:.4f}"
        assert _row(title, cells) in DOC


def test_its_table_of_dense_models_is_the_record():
    record = json.loads((ROOT / "results/minilm_slimming.json").read_text())
    rows = record["slimmed"]
    whole = {row["k"]: row for row in record["by_k"] if row["weight_of_a_chosen_expert"] == "1"}
    assert [row["kept_experts"] for row in rows] == [4, 8, 12, 15]
    assert _row("slimmed, then dense", [f"{row['cosine_mean']:.3f}" for row in rows]) in DOC
    at_k = [whole[row["kept_experts"]]["cosine_mean"] for row in rows]
    assert _row("all experts there, k of them active", [f"{cosine:.3f}" for cosine in at_k]) in DOC
    assert _row("parameters", [f"{row['parameters'] / 1e6:.1f} M" for row in rows]) in DOC
    assert _row("time of the dense model", [f"{row['time_of_dense']:.2f}" for row in rows]) in DOC
    times = [row["time_of_dense"] for row in rows]
    assert times == sorted(times) and times[0] < 0.9


def test_its_table_of_few_tokens_is_the_record():
    from benchmarks.few_tokens import table

    records = json.loads((ROOT / "results/few_tokens.json").read_text())["records"]
    assert len(records) == 2 * 2 * 2 * 4 and {record["repeats"] for record in records} == {15}
    assert table(records) in DOC
    text = " ".join(DOC.split())
    worst = max(max(r["ratio_to_dense"].values()) for r in records if r["part"] == "model")
    assert f"No k of a model takes more than {worst:.2f} of the dense model's time" in text and worst <= 1.05
    fours = [r["ratio_to_dense"]["k=4"] for r in records if r["part"] == "MLPs" and r["tokens"] == 1]
    small, large, small_two, large_two = (f"{ratio:.2f}" for ratio in fours)
    assert (
        f"k = 4 the MLPs take {small} and {small_two} of the dense MLPs' time (one and two threads) at MiniLM's" in text
    )
    assert f"{large} and {large_two} at GPT-2's" in text and max(fours) <= 0.5
