"""The models: Hugging Face's, with another MLP."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from bert.config import PretrainConfig
from bert.data import Vocabulary
from bert.flops import masked_lm
from bert.model import MaskedLM, build_model
from smoe import METHODS, get_top_k, smoe_layers
from smoe.dropout import Dropout
from smoe.flops import count
from smoe.methods import DenseMLP

TINY = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_hidden": 64, "num_experts": 8, "seq_len": 16}
VOCABULARIES = {
    "bert": Vocabulary(size=100, pad=0, unknown=1, start=2, end=3, mask=4),
    "roberta": Vocabulary(size=100, pad=1, unknown=3, start=0, end=2, mask=4),
}


def build(model, method="smoe_dropout", **options):
    return build_model(PretrainConfig(method, "unused", model=model, **{**TINY, **options}), VOCABULARIES[model])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", VOCABULARIES)
def test_each_layer_has_the_methods_mlp_and_keeps_the_rest(model, method):
    built = build(model, method)
    for layer in built.base_model.encoder.layer:
        assert isinstance(layer.output.dense, nn.Identity)
        assert isinstance(layer.output.LayerNorm, nn.LayerNorm) and isinstance(layer.output.dropout, Dropout)
        x = torch.randn(2, 16, 32)
        layer.eval()
        y = layer.intermediate(x)
        torch.testing.assert_close(layer.output(y, x), layer.output.LayerNorm(y + x))
    assert len(smoe_layers(built)) == (2 if METHODS[method].routed else 0)
    if not METHODS[method].routed:
        assert isinstance(layer.intermediate, DenseMLP)
        torch.testing.assert_close(layer.intermediate.activation(x), nn.functional.gelu(x))
    else:
        assert get_top_k(built) == METHODS[method].k_min(8)
    assert not [m for m in built.modules() if type(m) is nn.Dropout]


@pytest.mark.parametrize("model", VOCABULARIES)
def test_a_dense_model_computes_what_hugging_faces_own_does(model):
    import transformers

    ours = build(model, "dense_dropout").eval()
    own = getattr(transformers, type(ours).__name__)(ours.config).eval()
    state = {
        name.replace("intermediate.up.", "intermediate.dense.").replace("intermediate.down.", "output.dense."): value
        for name, value in ours.state_dict().items()
    }
    own.load_state_dict(state)
    ids = torch.randint(5, 100, (3, 16))
    torch.testing.assert_close(ours(ids).logits, own(ids).logits)


@pytest.mark.parametrize("model", VOCABULARIES)
def test_the_head_at_the_predicted_places_gives_the_models_own_loss(model):
    built = build(model).eval()
    ids, positions = torch.randint(5, 100, (3, 16)), torch.tensor([[1, 4, 5], [0, 2, 15], [3, 8, 9]])
    targets = torch.randint(5, 100, (3, 3))
    targets[2, 2] = -100
    labels = torch.full((3, 16), -100).scatter(1, positions, targets)
    expected = built(ids, labels=labels)
    output = MaskedLM(built)(ids, positions, targets)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits[5], expected.logits[1, 15])


@pytest.mark.parametrize(("model", "epsilon"), [("bert", 1e-12), ("roberta", 1e-5)])
def test_layer_norms_have_the_epsilon_of_the_published_checkpoint(model, epsilon):
    norms = [module for module in build(model).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 1 + 2 * TINY["num_layers"] + 1, "embeddings, two per layer, head"
    assert {norm.eps for norm in norms} == {epsilon}


def test_a_dense_mlp_has_dropout_between_its_linear_layers_alone_where_hugging_faces_has_none():
    built = build("bert", "dense_dropout", dropout=0.3, residual_dropout=0.2, attention_dropout=0.1)
    layer = built.base_model.encoder.layer[0]
    assert layer.intermediate.dropout.p == 0.3
    assert layer.output.dropout.p == layer.attention.output.dropout.p == built.base_model.embeddings.dropout.p == 0.2
    assert layer.attention.self.dropout.p == 0.1
    x = torch.randn(1, 50, 32)
    torch.manual_seed(3)
    y = layer.train().intermediate(x)
    torch.manual_seed(3)
    hidden = layer.intermediate.dropout(nn.functional.gelu(layer.intermediate.up(x)))
    assert 0.2 < (hidden == 0).float().mean() < 0.4
    torch.testing.assert_close(y, layer.intermediate.down(hidden))


def test_weights_are_drawn_as_the_model_draws_its_own():
    for method in ("smoe", "dense_dropout"):
        built = build("bert", method, d_model=64, d_hidden=512)
        for name, weight in built.named_parameters():
            if "intermediate" in name and weight.dim() > 1 and "bias" not in name:
                assert weight.std().item() == pytest.approx(0.02, rel=0.2), name


@pytest.mark.parametrize("method", ["smoe", "dense_dropout"])
def test_init_std_is_that_of_every_weight(method):
    built = build("bert", method, d_model=64, d_hidden=512, init_std=0.05)
    weights = {name: weight for name, weight in built.named_parameters() if weight.dim() > 1 and "bias" not in name}
    assert len(weights) > 10
    for name, weight in weights.items():
        if weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(0.05, rel=0.2), name


@pytest.mark.parametrize("model", VOCABULARIES)
def test_positions_may_start_as_sinusoids(model):
    table = build(model, position_init="sinusoid").base_model.embeddings.position_embeddings
    weight = table.weight.detach()
    for position in range(len(weight)):
        for column in range(0, 32, 2):
            angle = position / 10_000 ** (column / 32)
            expected = [0.1 * math.sin(angle), 0.1 * math.cos(angle)]
            if position == table.padding_idx:
                expected = [0.0, 0.0]
            assert weight[position, column : column + 2].tolist() == pytest.approx(expected, abs=1e-6)
    assert table.weight.requires_grad
    assert build(model).base_model.embeddings.position_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_keys_may_start_as_the_queries():
    for key_init, same in (("query", True), ("normal", False)):
        for layer in build("bert", key_init=key_init).base_model.encoder.layer:
            query, key = layer.attention.self.query.weight, layer.attention.self.key.weight
            assert torch.equal(query, key) == same and query.data_ptr() != key.data_ptr()


def test_routers_follow_the_seed_and_differ_from_layer_to_layer():
    def routers(seed):
        built = build("bert", seed=seed)
        return [next(b for n, b in layer.router.named_buffers() if b.dim() == 2) for _, layer in smoe_layers(built)]

    a, b, c = routers(1), routers(1), routers(2)
    assert all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0]) and not torch.equal(a[0], a[1])


@pytest.mark.parametrize("model", VOCABULARIES)
def test_flops_at_the_papers_sizes_are_table_1s(model):
    size = {"bert": 30522, "roberta": 50265}[model]
    config = PretrainConfig("smoe_dropout", "unused", model=model)
    assert config.d_hidden == {"bert": 6144, "roberta": 3072}[model]
    with torch.device("meta"):
        built = build_model(config, dataclasses.replace(VOCABULARIES[model], size=size))
    inputs = {"input_ids": torch.empty(8, 512, dtype=torch.int64, device="meta")}
    ours, paper = count(built, inputs, 8), count(masked_lm(model, "smoe_dropout", 8), inputs)
    assert ours.paper_linear == paper.paper_linear
    assert ours.params_total == paper.params_total


def test_the_engine_reaches_every_layer(monkeypatch):
    asked = []
    monkeypatch.setattr("smoe.layer.resolve_engine", lambda engine, compute: asked.append(engine) or "torch")
    build("bert", engine="fastmoe")
    assert asked == ["fastmoe"] * 2
