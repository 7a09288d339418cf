"""Which path ``auto`` takes."""

from __future__ import annotations

import sys

import pytest
import torch

from smoe import SMoE
from smoe.compute import PATHS, choose, few
from smoe.compute.choose import dense_pays
from smoe.router import PartialRouting


def make(d=12, n=4, h=6, k=2, dtype=torch.float32, **options) -> SMoE:
    torch.manual_seed(0)
    return SMoE(d, n * h, n, k, seed=3, **options).to(dtype)


def test_which_path_runs(monkeypatch):
    """``auto`` is dense at k = N and where the experts that a token has not chosen cost little; a name is that path."""
    ran = []
    for name in PATHS:
        monkeypatch.setitem(PATHS, name, lambda x, experts, routing, name=name: ran.append(name) or x)
    x, big, many = torch.randn(5, 12), torch.randn(5, 128), torch.randn(8192, 128)
    for k, path in ((1, "grouped"), (2, "grouped"), (4, "dense")):
        make(d=128, h=256, k=k)(many)
        assert ran.pop() == path
    make(k=2)(x)
    assert ran.pop() == "dense"
    make(d=128, h=256, k=2)(big)
    assert ran.pop() == "dense"
    with torch.no_grad():
        for k in (1, 2, 4):
            make(d=128, h=256, k=k, dtype=torch.float64)(big.double())
            assert ran.pop() == "few"
            make(d=128, h=256, k=k)(big)
            assert not ran  # in float32 the layer goes straight to what `few` computes: smoe.few_tokens
        make(d=128, h=256, k=2)(many)
        assert ran.pop() == "grouped"
    for name in PATHS:
        make(compute=name)(x)
        assert ran.pop() == name
    layer = make()
    assert choose("reference", x, layer.experts, layer.router(x)) is PATHS["reference"]
    with pytest.raises(ValueError, match="compute is 'fast'; it must be auto or one of"):
        make(compute="fast")


# (tokens, d, h, k) of 16 experts in float32, and the time of grouped over that of dense: forward passes on a Zen 5.
MEASURED = [
    ((256, 384, 32, 2), 1.37),
    ((256, 384, 96, 8), 1.27),
    ((256, 384, 384, 2), 0.43),
    ((2048, 128, 96, 2), 0.45),
    ((2048, 128, 32, 12), 1.41),
    ((2048, 768, 32, 12), 1.51),
    ((2048, 384, 192, 8), 0.59),
    ((2048, 768, 192, 12), 0.85),
]


@pytest.mark.parametrize(("shape", "ratio"), MEASURED, ids=str)
def test_auto_takes_the_path_that_was_faster(shape, ratio):
    tokens, d, h, k = shape
    x, layer = torch.randn(tokens, d), make(d=d, h=h, n=16, k=k)
    path = choose("auto", x, layer.experts, layer.router(x))
    assert path is PATHS["dense" if ratio > 1 else "grouped"]


def test_auto_counts_pairs_and_not_slots():
    """Where slots are empty, as with one k per row or with experts on several ranks."""
    layer = make(d=128, h=512, n=4, k=4)
    x, indices = torch.randn(2048, 128), torch.arange(4).expand(2048, 4).contiguous()
    full = choose("auto", x, layer.experts, PartialRouting(indices, torch.ones(2048, 4), None))
    indices[:, 1:] = -1
    one = choose("auto", x, layer.experts, PartialRouting(indices, torch.ones(2048, 4), None))
    assert full is PATHS["dense"] and one is PATHS["grouped"]


def test_auto_leaves_few_tokens_to_the_rule_of_few():
    layer = make(d=768, h=192, n=16, k=4).bfloat16()
    x = torch.randn(64, 768).bfloat16()
    routing = layer.router(x)
    assert dense_pays(x, layer.experts, routing)
    with torch.no_grad():
        assert not few.pays(64, 4, layer.experts, torch.bfloat16)
        assert choose("auto", x, layer.experts, routing) is PATHS["grouped"]


def test_amx_favours_dense_in_bfloat16(monkeypatch):
    layer, x = make(d=384, h=96, n=16, k=8), torch.randn(800, 384)
    for factor, pays in ((1, False), (2, True)):
        monkeypatch.setattr(sys.modules["smoe.compute.choose"], "BF16_FACTOR", factor)
        assert dense_pays(x.bfloat16(), layer.experts, layer.router(x)) == pays
        assert not dense_pays(x, layer.experts, layer.router(x))


def test_only_float32_gains_from_onednn_at_few_tokens(monkeypatch):
    experts = make(d=768, h=192, n=16, k=1).experts
    for onednn in (False, True):
        monkeypatch.setattr(few, "onednn_float32", lambda onednn=onednn: onednn)
        assert few.pays(64, 1, experts, torch.float32) == onednn
        assert not few.pays(64, 1, experts, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_choice_compiles_and_takes_any_number_of_tokens(dtype):
    layer, graphs = make(d=64, h=64, n=16, k=2, dtype=dtype, compute="auto"), []
    torch.compiler.reset()

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (100, 3000):
        x = torch.randn(tokens, 64).to(dtype)
        with torch.no_grad():
            layer.compute = "reference"
            want = layer(x)
            layer.compute = "auto"
        torch.testing.assert_close(compiled(x), want, rtol=2e-2, atol=2e-2)
    assert len(graphs) == 1
