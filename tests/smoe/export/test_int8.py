"""Experts in int8: numbers as of dequantised weights and as torchao's linear layers; any k, slimmed, saved, loaded."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn

import smoe
from smoe.export import to_int8

pytest.importorskip("torchao")


class Block(nn.Module):
    """A gated MLP, or one with biases, behind a linear layer."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.gate = nn.Linear(16, 64, bias=False) if gated else None
        self.up, self.down = nn.Linear(16, 64, bias=not gated), nn.Linear(64, 16, bias=not gated)

    def forward(self, x):
        x, act = self.first(x), nn.functional.silu
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


def make(gated=False, num_experts=4, **options):
    torch.manual_seed(0)
    model = smoe.modulize(Block(gated).eval(), num_experts, **{"seed": 0, **options})
    for _, layer in smoe.smoe_layers(model):
        layer.router.weight.normal_()
    return model


def layer_of(model):
    return smoe.smoe_layers(model)[0][1]


@pytest.fixture
def x():
    return torch.randn(3, 7, 16)


def rounded(rows, dynamic):
    """rows with each of them rounded to 255 steps."""
    if not dynamic:
        return rows
    step = rows.abs().amax(-1, keepdim=True) / 127.5
    return (rows * (1 / step)).round().clamp(-128, 127) * step


def naive(model, x, dynamic):
    """The model token by token, from dequantised weights."""
    layer, x = layer_of(model), model.first(x).detach()
    experts, flat = layer.experts, x.reshape(-1, 16)
    routing = layer.router(flat)
    up, down = experts.up.dequantize(), experts.down.dequantize()
    y = torch.zeros_like(flat)
    for t in range(len(flat)):
        for e, weight in zip(routing.indices[t], routing.weights[t], strict=True):
            token, bias = rounded(flat[t], dynamic), experts.up_bias
            hidden = up[e] @ token + (0 if bias is None else bias[e])
            if experts.gated:
                hidden = nn.functional.silu(experts.gate.dequantize()[e] @ token) * hidden
            else:
                hidden = nn.functional.silu(hidden)
            out = rounded(hidden, dynamic) @ down[e]
            y[t] += weight * (out if bias is None else out + experts.down_bias[e])
    return y.view(x.shape)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_numbers_are_those_of_dequantised_weights(gated, dynamic, k, x):
    full = make(gated)
    model = to_int8(copy.deepcopy(full), dynamic=dynamic)
    for each in (model, full):
        smoe.set_top_k(each, k)
    with torch.no_grad():
        y, want = model(x), full(x)
        off = (y - naive(model, x, dynamic)).abs().amax(-1)
        # Dynamic, a last bit of a hidden unit here and there decides to which step it is rounded.
        assert (off < 1e-5).double().mean() > (0.8 if dynamic else 0.999) and off.max() < 0.01 * want.abs().max()
        assert 1e-5 < (y - want).abs().max() < 0.03 * want.abs().max()
        assert torch.cosine_similarity(y.flatten(), want.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_expert_is_what_torchao_makes_of_the_dense_mlp(dynamic, x):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    dense = Block(gated=False).eval()
    model = to_int8(smoe.modulize(copy.deepcopy(dense), 1, score="sum"), dynamic=dynamic)
    quantize_(dense, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig())
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_slimmed_saved_and_loaded_it_is_the_same_and_small(dynamic, x):
    model = make(num_experts=4, top_k=2)
    slim = smoe.slim(to_int8(copy.deepcopy(model), dynamic=dynamic), smoe.vote(model, [x]), keep=3)
    want = to_int8(smoe.slim(copy.deepcopy(model), smoe.vote(model, [x]), keep=3), dynamic=dynamic)
    file = io.BytesIO()
    torch.save(slim.state_dict(), file)
    file.seek(0)
    loaded = smoe.slim(copy.deepcopy(model), smoe.vote(model, [x]), keep=3)
    loaded.load_state_dict(torch.load(file, weights_only=True), assign=True)
    with torch.no_grad():
        assert torch.equal(slim(x), want(x)) and torch.equal(slim(x), loaded(x))
    experts = layer_of(loaded).experts
    assert experts.int8 and experts.up.qdata.shape == (3, 16, 16) and experts.up.qdata.dtype == torch.int8
    assert experts.up.scale.shape == (3, 16, 1) and experts.down.scale.shape == (3, 1, 16)


def test_bytes_are_a_quarter():
    def size(model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return file.getbuffer().nbytes

    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    model = smoe.modulize(mlp, 4)
    before = size(model)
    assert size(to_int8(model)) < 0.28 * before


def test_other_ways_to_run_it(x):
    model = to_int8(make(top_k=3))
    with torch.no_grad():
        with smoe.activated(model, torch.tensor([1, 4, 2])):
            mixed = model(x)
        for row, k in enumerate((1, 4, 2)):
            with smoe.activated(model, k):
                torch.testing.assert_close(mixed[row], model(x[row]), atol=1e-6, rtol=0)
        assert model(x[:0]).shape == (0, 7, 16)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.cosine_similarity(model(x).float().flatten(), model(x).flatten().float(), dim=0) > 0.99
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=0)
    inputs = x.clone().requires_grad_()
    model(inputs).sum().backward()  # weight-only: gradients pass through, to adapters for instance
    got, inputs.grad = inputs.grad, None
    layer = layer_of(model)
    flat = model.first(inputs).view(-1, 16)
    from smoe.compute import PATHS

    PATHS["reference"](flat, layer.experts, layer.router(flat)).sum().backward()
    torch.testing.assert_close(got, inputs.grad, atol=1e-5, rtol=0)


def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch):
    model = to_int8(make(), dynamic=True)
    with pytest.raises(ValueError, match="mlp are int8 already"):
        to_int8(model)
    with pytest.raises(ValueError, match="demodulize: the experts of down are int8; do it before to_int8"):
        smoe.demodulize(model)
    with pytest.raises(ValueError, match="is int8; save the model before to_int8, or its tensors with torch.save"):
        smoe.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="dynamic int8 experts can't be exported"):
        torch.export.export(model, (torch.randn(2, 16),))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="to_int8 needs torchao: pip install torchao"):
        to_int8(make())
