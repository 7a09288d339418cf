"""Every fast path computes what the reference path computes: outputs and all gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoe import Routing, SMoE
from smoe.compute import PATHS, choose, dense, few, grouped_mm, grouping, products
from smoe.compute.fast_path import FAST_PATHS
from smoe.compute.grouping import PADDING, group
from smoe.router import ROUTERS, SCORES, PartialRouting

FAST = ["dense", "few", "grouped"]
# Relative error: norm of the difference over norm of the reference. In bfloat16 the reference itself rounds every
# intermediate result to 8 bits, so 2 % is a handful of roundings.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def gradients(layer: SMoE, path: str, x: torch.Tensor, grad: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    layer.compute = path
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(1)  # the uniform router draws
    y = layer(leaf, **kwargs)
    y.backward(grad)
    found = {"y": y.detach(), "x": leaf.grad}
    return found | {name: p.grad.clone() for name, p in layer.named_parameters()}


def assert_equal(layer: SMoE, path: str, x: torch.Tensor, tolerance: float | None = None, **kwargs) -> None:
    grad = torch.randn(x.shape, dtype=x.dtype)
    want = gradients(layer, "reference", x, grad, **kwargs)
    got = gradients(layer, path, x, grad, **kwargs)
    tolerance = tolerance or TOLERANCE[x.dtype]
    torch.manual_seed(1)
    with torch.no_grad():  # where the path may be another one
        got["y without gradients"], want["y without gradients"] = layer(x, **kwargs), want["y"]
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        # A sum over tokens can cancel to almost 0, while its error does not: so divide by at least 0.3.
        # (PyTorch's GELU of a single number differs by up to 1e-6 from its GELU of that number within a longer tensor.)
        error = (got[name] - value).norm() / value.norm().clamp_min(0.3)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def make(d=12, n=4, h=6, k=2, dtype=torch.float32, **options) -> SMoE:
    torch.manual_seed(0)
    layer = SMoE(d, n * h, n, k, seed=3, **options).to(dtype)
    with torch.no_grad():  # with the usual scale the routing weights would be almost equal, and the biases small
        for p in (layer.experts.up_bias, layer.experts.gate_bias, layer.experts.down_bias):
            if p is not None:
                p.normal_()
        if hasattr(layer.router, "weight"):
            layer.router.weight.mul_(30)
    return layer


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", pytest.param(torch.tanh, id="tanh")])
@pytest.mark.parametrize("gated", [False, True])
def test_equals_reference(path, dtype, activation, gated):
    for bias in (False, True):
        for k in (1, 3, 4):
            assert_equal(
                make(k=k, dtype=dtype, activation=activation, gated=gated, bias=bias),
                path,
                torch.randn(50, 12).to(dtype),
            )


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_and_score(path, score, router):
    layer = make(k=3, router=router, score=score, vocab_size=20, output_scale="k")
    kwargs = {"token_ids": torch.randint(20, (40,))} if layer.needs_token_ids else {}
    assert_equal(layer, path, torch.randn(40, 12), **kwargs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("path", FAST)
def test_any_shape(path, data):
    n = data.draw(st.integers(1, 6), "N")
    layer = make(
        d=data.draw(st.integers(1, 20), "d"),
        n=n,
        h=data.draw(st.integers(1, 20), "h"),
        k=data.draw(st.integers(1, n), "k"),
        activation=data.draw(st.sampled_from(["relu", "gelu"])),
        gated=data.draw(st.booleans(), "gated"),
        router=data.draw(st.sampled_from(["random", "uniform"])),
    )
    assert_equal(layer, path, torch.randn(data.draw(st.integers(0, 70), "T"), layer.d_model))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 90])
def test_all_tokens_to_one_expert(path, dtype, tokens):
    layer = make(k=1, dtype=dtype)
    layer.router.bias[2] = 1e4
    assert_equal(layer, path, torch.randn(tokens, 12).to(dtype))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_chunks(path, dtype, monkeypatch):
    """Results do not depend on the size of chunks and blocks."""
    monkeypatch.setattr(grouping, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(dense, "BLOCK_BYTES", 2000)
    for k in (1, 3, 4):
        for gated in (False, True):
            assert_equal(make(k=k, dtype=dtype, gated=gated), path, torch.randn(333, 12).to(dtype))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("h", [3, 40])
def test_routing_weights_on_either_side(path, h):
    """The regimes of grouped.backward: h < d and h > d, with and without the gradient of the weights."""
    for router in ("random", "uniform"):
        assert_equal(make(h=h, k=3, router=router), path, torch.randn(40, 12))


@pytest.mark.parametrize("path", FAST)
def test_custom_routing(path):
    """Indices in any order, also at k = N, and weights that are 0, negative and need gradients."""
    layer = make(k=4)
    x, grad = torch.randn(30, 12), torch.randn(30, 12)
    for k in (2, 4):
        indices = torch.rand(30, 4).argsort(1)[:, :k]
        results = []
        for name in ("reference", path):
            weights = torch.linspace(-1, 1, 30 * k).view(30, k).clone()
            weights[3] = 0
            weights.requires_grad_()
            layer.zero_grad()
            y = PATHS[name](x, layer.experts, Routing(indices, weights, None))
            y.backward(grad)
            results.append([y, weights.grad, *(p.grad.clone() for p in layer.experts.parameters())])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [*FAST, "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_absent_slots_count_for_nothing(path, dtype, gated, share):
    """An index of -1 gives no output and no gradient, whatever its weight; also if all slots of a token are absent."""
    layer = make(d=16, n=4, h=8, k=3, dtype=dtype, gated=gated)
    x, grad = torch.randn(70, 16).to(dtype), torch.randn(70, 16).to(dtype)
    indices = torch.rand(70, 4).argsort(1)[:, :3]
    indices[torch.rand(70, 3) < share] = -1
    weights = torch.rand(70, 3)
    found = {}
    for name in ("reference", path):
        layer.zero_grad()
        leaf, leaf_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = PATHS[name](leaf, layer.experts, PartialRouting(indices, leaf_weights, None))
        y.backward(grad)
        found[name] = {"y": y.detach(), "x": leaf.grad, "weights": leaf_weights.grad}
        found[name] |= {n: p.grad.clone() for n, p in layer.experts.named_parameters()}
    assert (found[path]["weights"][indices < 0] == 0).all()
    for name, want in found["reference"].items():
        error = (found[path][name] - want).norm() / want.norm().clamp_min(0.1)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("path", FAST)
def test_strided_input_and_gradient(path):
    layer = make(k=2)
    base, grad = torch.randn(12, 5, 8), torch.randn(12, 5, 8).permute(2, 1, 0)
    want = gradients(layer, "reference", base.permute(2, 1, 0), grad)
    got = gradients(layer, path, base.permute(2, 1, 0), grad)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("k", [2, 4])
def test_autocast_types_are_those_of_linear(path, k):
    layer, x = make(k=k), torch.randn(50, 12)
    with torch.autocast("cpu", torch.bfloat16):
        linear = torch.nn.Linear(12, 12)(x).dtype
        layer.compute = path
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
    y.sum().backward()
    assert y.dtype == linear == torch.bfloat16
    assert leaf.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_bfloat16_is_as_accurate_as_the_dense_mlp():
    """Error against float64, at most 2 times that of Linear, ReLU, Linear in bfloat16 (measured: 1.1 to 1.4)."""
    d, n, h, tokens = 64, 16, 32, 500
    for path in FAST:
        torch.manual_seed(0)
        layer = SMoE(d, n * h, n, n, score="sum", compute=path).bfloat16()
        experts, x = layer.experts, torch.randn(tokens, d).bfloat16()
        up, down = experts.up.view(n * h, d), experts.down.view(n * h, d)
        up_bias, down_bias = experts.up_bias.flatten(), experts.down_bias.float().sum(0).bfloat16()
        dense = torch.relu(x @ up.t() + up_bias) @ down.t().t() + down_bias
        exact = torch.relu(x.double() @ up.double().t() + up_bias.double()) @ down.double()
        exact += experts.down_bias.double().sum(0)
        ours, theirs = ((y.double() - exact).norm().item() for y in (layer(x), dense))
        assert ours <= 2 * theirs, (path, ours / theirs)


@pytest.mark.parametrize("path", sorted(FAST_PATHS))
def test_no_grad_keeps_nothing(path, monkeypatch):
    results, functions = [], FAST_PATHS[path]
    spy = functions._replace(forward=lambda *args: results.append(functions.forward(*args)) or results[-1])
    monkeypatch.setitem(FAST_PATHS, path, spy)
    layer, x = make(k=2, compute=path), torch.randn(20, 12)
    y = layer(x)
    assert results[-1][1]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    assert not results[-1][1]


@pytest.mark.parametrize("path", FAST)
def test_backward_twice_over_a_kept_graph(path):
    layer, x = make(k=2, compute=path), torch.randn(20, 12, requires_grad=True)
    loss = layer(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("path", FAST)
def test_second_derivative_raises(path):
    layer, x = make(k=2, compute=path), torch.randn(20, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_padding_limits_the_number_of_kernel_shapes():
    """Where oneDNN computes, every product of an expert has a multiple of 64 rows for any routing."""
    indices = torch.rand(300, 4).topk(2).indices
    padded, exact = (group(torch.zeros(300, 12, dtype=t), indices, 4) for t in (torch.bfloat16, torch.float64))
    assert all((end - start) % PADDING == 0 for start, end in padded.spans)
    assert exact.num_pairs == 600 <= padded.num_pairs <= 600 + 4 * PADDING
    few = group(torch.zeros(9, 12, dtype=torch.bfloat16), indices[:9], 4)  # padding to 64 would be most of the work
    assert few.num_pairs <= 18 + 4 * 8 and all((end - start) % 8 == 0 for start, end in few.spans)
    for found in (padded, exact):
        tokens = torch.arange(300).unsqueeze(1).expand(-1, 2)
        assert torch.equal(found.tokens[found.position], tokens)
        for expert, (start, end) in enumerate(found.spans):
            here = (found.position >= start) & (found.position < end)
            assert torch.equal(here, indices == expert)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("onednn", [False, True])
def test_float32_products_of_either_library(path, onednn, monkeypatch):
    """float32 products by oneDNN (rows are padded then) and by MKL are equally exact."""
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("needs a PyTorch with oneDNN")
    called = []
    real = torch.ops.mkldnn._linear_pointwise if onednn else None
    monkeypatch.setattr(products, "ONEDNN_FLOAT32", 1)
    for module in (products, grouping, few):
        monkeypatch.setattr(module, "onednn_float32", lambda: onednn)
    if onednn:
        spy = SimpleNamespace(_linear_pointwise=lambda *args: called.append(args) or real(*args))
        monkeypatch.setattr(products.torch.ops, "mkldnn", spy)
    for gated in (False, True):
        assert_equal(make(k=3, gated=gated), path, torch.randn(150, 12))
    assert bool(called) == onednn


@torch.no_grad()
def test_counters_of_flops_see_few_tokens(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(few, "onednn_float32", lambda: torch.backends.mkldnn.is_available())
    layer = make(k=4)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 12))
    assert counter.get_total_flops() >= 4 * 12 * layer.d_hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_grouped_mm_on_the_cpu(dtype, gated):
    """The CUDA path's logic, through PyTorch's own fallback."""
    for k in (1, 3, 4):
        for bias in (False, True):
            layer = make(d=16, h=8, k=k, dtype=dtype, gated=gated, bias=bias, router="learned")
            assert_equal(layer, "grouped_mm", torch.randn(50, 16).to(dtype))
    assert_equal(make(d=16, h=8, dtype=dtype), "grouped_mm", torch.randn(0, 16).to(dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["grouped_mm", "grouped", "dense"])
def test_on_cuda(path):
    layer, x = make(d=64, h=64, k=2, router="learned").bfloat16().cuda(), torch.randn(300, 64).bfloat16().cuda()
    grad = torch.randn_like(x)
    want, got = (gradients(layer, name, x, grad) for name in ("reference", path))
    for name, value in want.items():
        assert (got[name] - value).norm() <= 2e-2 * value.norm(), name
    layer.compute = "auto"
    assert choose("auto", x, layer.experts, layer.router(x)) is grouped_mm.compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_compiles_into_one_graph(dtype, k, gated):
    layer = make(d=16, h=8, k=k, dtype=dtype, gated=gated, compute="grouped" if k < 4 else "dense")
    x, grad = torch.randn(40, 16).to(dtype), torch.randn(40, 16).to(dtype)
    want = gradients(layer, layer.compute, x, grad)
    torch.compiler.reset()  # graphs of other tests count towards the limit on recompilations
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    y.backward(grad)
    torch.testing.assert_close(y, want["y"])
    torch.testing.assert_close(leaf.grad, want["x"])
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, want[name])
