"""Every YAML parses for every method, and the sizes it declares are those of the model it builds."""

import dataclasses

import pytest
import torch
import yaml

from smoe import METHODS, smoe_layers
from smoe.options import field_metadata
from smoe.train.command import parse_config
from transformer_xl.config import LanguageModelConfig

SCALES = yaml.safe_load(LanguageModelConfig.scales_file.read_text())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_yaml_builds_the_model_it_says(scale, method):
    argv = ["--method", method, "--scale", scale, "--run_dir", "unused"]
    config = parse_config(LanguageModelConfig, argv)
    assert {name: getattr(config, name) for name in SCALES[scale]} == SCALES[scale]
    with torch.device("meta"):
        model = config.build_model()
    layers = smoe_layers(model)
    assert len(layers) == (config.num_layers if METHODS[method].routed else 0)
    assert all(layer.d_hidden == config.d_hidden and layer.num_experts == 16 for _, layer in layers)
    # The release drops hidden units inside every expert, after ReLU, at every scale.
    assert [layer.experts.dropout for _, layer in layers] == [0.1] * len(layers)


def test_scales():
    assert list(SCALES) == ["paper", "hour", "cpu", "smoke"]


def test_paper_scale_is_the_papers():
    config = parse_config(LanguageModelConfig, ["--method", "smoe_dropout", "--scale", "paper", "--run_dir", "x"])
    sizes = (config.num_layers, config.d_model, config.num_heads, config.d_head, config.d_hidden)
    assert sizes == (4, 256, 8, 64, 8192)
    assert (config.steps, config.batch_size, config.tgt_len, config.mem_len) == (400_000, 22, 512, 512)
    assert (config.learning_rate, config.clip, config.warmup_steps) == (2.5e-4, 0.25, 0)
    assert (config.eval_batch_size, config.eval_tgt_len, config.eval_mem_len) == (10, 128, 896)
    assert config.eval_tokens is None and config.output_scale == 1 and config.score == "softmax_after_topk"
    assert config.k_schedule() == (8, 16, "linear")
    assert [config.ks_at(step) for step in (0, 200_000, 399_999)] == [[8] * 4, [12] * 4, [16] * 4]


def test_learned_and_thor_use_two_experts():
    for method in ("smoe", "thor"):
        config = LanguageModelConfig(method, "unused")
        assert config.ks_at(0) == config.ks_at(399_999) == [2] * 4 and config.eval_ks() == [2, 16]
    assert LanguageModelConfig("dense_dropout", "unused").ks_at(0) == []


def test_sweep_leaves_out_what_the_model_does_not_have():
    config = LanguageModelConfig("smoe_dropout", "unused", num_experts=8, d_hidden=64)
    assert config.sweep_ks() == [1, 2, 4, 8]


def test_a_share_of_the_width_is_applied_once():
    argv = ["--method", "smoe_dropout", "--run_dir", "x", "--scale", "paper", "--num_experts", "4"]
    config = parse_config(LanguageModelConfig, [*argv, "--d_hidden_share", "0.25"])
    assert config == parse_config(LanguageModelConfig, [*argv, "--d_hidden", "2048"])
    again = dataclasses.replace(config, seed=2)
    assert (again.d_hidden, again.d_hidden_share, again.d_hidden // again.num_experts) == (2048, None, 512)
    with torch.device("meta"):
        assert smoe_layers(config.build_model())[0][1].d_hidden == 2048


@pytest.mark.parametrize("share", [0, -0.5, 0.3, 1 / 16384, float("nan"), float("inf")])
def test_a_share_that_gives_no_whole_width_is_refused(share):
    with pytest.raises(ValueError, match="d_hidden_share is .*d_hidden = 8192 must be a whole number of at least 1"):
        LanguageModelConfig("dense_dropout", "unused", d_hidden_share=share)


def test_every_field_is_documented():
    notes = {name: known.get("help") for name, known in field_metadata(LanguageModelConfig).items()}
    assert notes.keys() == {field.name for field in dataclasses.fields(LanguageModelConfig)}
    assert [name for name, note in notes.items() if not note] == ["scale_reason"]


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("dense_dropout", {"k_min": 3}, "k_min is 3.*no experts"),
        ("dense_dropout", {"router": "hash"}, "router is 'hash'.*no experts"),
        ("dense_dropblock", {"output_scale": "k"}, "output_scale is 'k'.*no experts"),
        ("dense_concrete_dropout", {"dropout": 0.0}, "dropout is 0.*above 0"),
        ("smoe", {"balance_weight": -1.0}, "balance_weight is -1.*at least 0"),
        ("thor", {"consistency_weight": float("nan")}, "consistency_weight is nan"),
        ("smoe_dropout", {"sweep": (17, 32)}, r"sweep is \[17, 32\].*num_experts = 16"),
        ("smoe_dropout", {"seed": 10**20}, "seed is 1.*at most"),
    ],
)
def test_what_cannot_be_meant_is_refused(method, fields, words):
    with pytest.raises(ValueError, match=words):
        LanguageModelConfig(method, "unused", **fields)


def test_the_largest_seed_builds_a_model():
    config = LanguageModelConfig("smoe_dropout", "unused", seed=2**53, d_model=8, d_hidden=32, num_layers=1)
    torch.manual_seed(config.seed)
    config.build_model()
