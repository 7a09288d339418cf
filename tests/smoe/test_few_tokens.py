"""The whole layer at few tokens without gradients: the ordinary way's numbers, and nothing is remembered."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import smoe
from smoe import SMoE
from smoe.compute import few

D, N, H = 12, 4, 24


def make(k: int = 2, n: int = N, **options) -> SMoE:
    torch.manual_seed(0)
    layer = SMoE(D, H, n, k, seed=3, **options).eval()
    with torch.no_grad():
        for name, p in layer.experts.named_parameters():
            p.normal_(std=0.5 if name.endswith("bias") else 0.3)
        if hasattr(layer.router, "weight"):
            layer.router.weight.mul_(30)
            layer.router.bias.normal_()
    return layer


def naive(layer: SMoE, x: Tensor) -> Tensor:
    """Eq. 1 token by token in float64, from weights alone; for ReLU and linear routers."""
    e = {name: p.detach().double() for name, p in layer.experts.named_parameters()}
    rows = []
    for token in x.reshape(-1, D).double():
        logits = layer.router.weight.double() @ token + layer.router.bias.double()
        chosen = logits.argsort(descending=True)[: layer.top_k]
        weights = {
            "sum": torch.ones(len(chosen)).double(),
            "softmax_after_topk": logits[chosen].softmax(0),
            "softmax_before_topk": logits.softmax(0)[chosen],
        }[layer.router.score]
        y = torch.zeros(D).double()
        for i, weight in zip(chosen, weights, strict=True):
            up = e["up"][i] @ token + e.get("up_bias", torch.zeros(N, 1).double())[i]
            hidden = up.relu()
            if "gate" in e:
                hidden = (e["gate"][i] @ token + e.get("gate_bias", torch.zeros(N, 1).double())[i]).relu() * up
            y += weight * (hidden @ e["down"][i] + e.get("down_bias", torch.zeros(N, 1).double())[i])
        rows.append(layer.scale * y)
    return torch.stack(rows).view(x.shape).float()


def assert_same(layer: SMoE, x: Tensor) -> None:
    """Within 1e-6 of the naive numbers, by the way of few tokens."""
    with torch.no_grad():
        y = layer._few_tokens(x)
        assert y is not None and y.shape == x.shape
        want = naive(layer, x)
        assert (y - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("router", ["random", "learned"])
@pytest.mark.parametrize("score", smoe.router.SCORES)
def test_the_numbers_are_those_of_eq_1(router, score, pairs, monkeypatch):
    monkeypatch.setattr(few, "PAIR_STARTS", -1 if pairs else 1 << 40)  # one product per pair, or all experts
    ran = []
    real = few._pairs
    monkeypatch.setattr(few, "_pairs", lambda *args: ran.append(1) or real(*args))
    for options in (
        {},
        {"bias": False, "gated": True, "output_scale": "k"},
        {"gated": True, "output_scale": "num_experts"},
        {"bias": False, "output_scale": 0.5},
    ):
        layer = make(router=router, score=score, **options)
        for k in (1, 2, 3, 4):
            layer.top_k = k
            for shape in ((D,), (1, 1, D), (3, D), (few.TRANSPOSED + 1, D)):
                assert_same(layer, torch.randn(shape))
    assert bool(ran) == pairs


def test_what_changes_counts_at_once():
    layer, x = make(), torch.randn(1, D)
    assert_same(layer, x)
    smoe.set_top_k(layer, 3)
    assert_same(layer, x)
    other = make()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
        other.router.weight.mul_(-1)
    layer.load_state_dict(other.state_dict())
    assert_same(layer, x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    assert_same(layer, x)
    layer.experts.down = nn.Parameter(layer.experts.down.detach() * 2)
    assert_same(layer, x)
    model = nn.Sequential(layer)
    smoe.slim(model, {"0": torch.tensor([0, 3, 1, 2])}, keep=2)
    assert model[0].num_experts == 2
    for k in (1, 2):
        smoe.set_top_k(model, k)
        assert_same(model[0], x)
    model.to(torch.bfloat16)
    with torch.no_grad():
        low = x.to(torch.bfloat16)
        assert model[0]._few_tokens(low) is None
        y = model(low)
        assert (y.float() - naive(model[0], low)).norm() <= 0.02 * y.float().norm()
    model.to(torch.float32)
    assert_same(model[0], x)


def test_the_ordinary_way_is_taken_where_something_needs_it():
    x = torch.randn(2, D)
    layer = make()
    layer.train()
    assert layer._few_tokens(x) is None and layer(x).requires_grad  # gradients are wanted
    with torch.no_grad():
        assert layer._few_tokens(x) is not None  # training alone is no reason
        assert layer._few_tokens(torch.randn(few.MOST_TOKENS + 1, D)) is None
        assert layer._few_tokens(x[:0]) is None and layer(x[:0]).shape == (0, D)
        assert layer._few_tokens(x.double()) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert layer._few_tokens(x) is None
        with smoe.record_routing(layer) as routings:
            assert layer._few_tokens(x) is None
            layer(x)
        assert len(routings) == 1
        with smoe.activated(layer, torch.tensor([1, 3])):
            assert layer._few_tokens(x) is None
        for part in (layer.router, layer.experts):
            handle = part.register_forward_pre_hook(lambda *_: None)
            assert layer._few_tokens(x) is None
            handle.remove()
        for options in ({"dropout": 0.5}, {"router": "uniform"}, {"compute": "reference"}, {"compute": "grouped"}):
            assert make(**options).train()._few_tokens(x) is None, options
        half = make()
        half.experts.down.data = half.experts.down.data.bfloat16()
        assert half._few_tokens(x) is None and half(x).dtype == torch.float32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(layer, x, check_trace=False)
        layer.router.forward = lambda *args: None  # as accelerate's hooks do
        assert layer._few_tokens(x) is None
        del vars(layer.router)["forward"]
        many = torch.randn(70, D)
        assert torch.allclose(traced(many), layer(many), atol=1e-5)  # the trace holds for other inputs
    layer.eval()
    mapped = torch.func.jvp(lambda t: layer(t), (x,), (torch.ones_like(x),))
    assert torch.allclose(mapped[0], naive(layer, x), atol=1e-5)


def test_a_subclass_of_the_router_is_asked():
    class Mine(smoe.router.RandomRouter):
        def forward(self, x, *args):
            routing = super().forward(x, *args)
            return routing._replace(weights=routing.weights * 2)

    layer, x = make(), torch.randn(1, D)
    with torch.no_grad():
        want = 2 * layer(x)
        mine = Mine(D, N, 2, seed=3)
        mine.load_state_dict(layer.router.state_dict())
        layer.router = mine
        assert torch.allclose(layer(x), want, atol=1e-6)
