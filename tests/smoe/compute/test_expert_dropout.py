"""Dropout on the experts' hidden units: every path equals the formula for the masks that it draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoe import Routing, SMoE
from smoe.compute import PATHS
from smoe.dropout import keep_mask
from smoe.experts import Experts
from smoe.router import PartialRouting

FAST = ["dense", "grouped"]
TOKENS, D, N, H, P = 40, 16, 4, 8, 0.3
ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh}


class Masks:
    """Instead of random masks, those of ``keep (T, N, H)``, whatever rows and experts a path draws for at a time."""

    def __init__(self, path: str, keep: Tensor, indices: Tensor) -> None:
        by_expert = [keep[(indices == e).any(1), e] for e in range(N)]
        if path == "dense":
            self.blocks = list(keep.unbind(1))
        elif path == "grouped_mm":
            self.blocks = [torch.cat(by_expert)]
        else:
            self.blocks = by_expert

    def __call__(self, shape: torch.Size, p: float, like: Tensor) -> Tensor:
        assert p == P and like.shape[1] == shape[1]
        block = torch.cat([self.blocks.pop(0) for _ in range(shape[1] // H)], 1)
        padding = shape[0] - block.shape[0]  # rows whose results nobody reads
        assert padding >= 0
        return torch.cat([block, torch.randint(2, (padding, shape[1]))]).to(like.dtype)


def formula(x: Tensor, routing: Routing, keep: Tensor, parameters: dict[str, Tensor], activation: str) -> Tensor:
    """Every token through every expert, in float64, with the weights of those that it has not chosen 0."""

    def linear(name: str) -> Tensor:
        out = torch.einsum("td,nhd->tnh", x, parameters[name])
        return out + parameters[f"{name}_bias"] if f"{name}_bias" in parameters else out

    act = ACTIVATIONS[activation]
    hidden = act(linear("gate")) * linear("up") if "gate" in parameters else act(linear("up"))
    out = torch.einsum("tnh,nhd->tnd", hidden * keep / (1 - round(P * 65536) / 65536), parameters["down"])
    if "down_bias" in parameters:
        out = out + parameters["down_bias"]
    present = routing.indices >= 0
    weights = torch.zeros(x.shape[0], N, dtype=x.dtype)
    weights = weights.scatter_add(1, routing.indices.clamp_min(0), routing.weights * present)
    return torch.einsum("tn,tnd->td", weights, out)


def make(dtype: torch.dtype = torch.float32, d: int = D, **options) -> Experts:
    torch.manual_seed(1)
    experts = Experts(N, d, H, dropout=P, **options).to(dtype)
    with torch.no_grad():
        for name, p in experts.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return experts


def route(k: int, absent: float = 0.0) -> Routing:
    indices = torch.rand(TOKENS, N).argsort(1)[:, :k]
    indices[torch.rand(TOKENS, k) < absent] = -1
    return (PartialRouting if absent else Routing)(indices, torch.rand(TOKENS, k), None)


def check(
    monkeypatch, path: str, experts: Experts, routing: Routing, autocast: bool = False, frozen: list[str] = ()
) -> None:
    """Output and gradients, apart from those of what is ``frozen``, against the formula."""
    dtype, d = experts.up.dtype, experts.d_model
    x, grad = torch.randn(TOKENS, d).to(dtype), torch.randn(TOKENS, d)
    keep = (torch.rand(TOKENS, N, H) > P).long()
    masks = Masks(path, keep, routing.indices)
    for module in ("smoe.dropout", "smoe.compute.hidden"):
        monkeypatch.setattr(f"{module}.keep_mask", masks)
    leaves = {"x": x.clone(), "weights": routing.weights.clone()} | dict(experts.named_parameters())
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = PATHS[path](leaves["x"], experts, routing._replace(weights=leaves["weights"]))
    (y.float() * grad).sum().backward()
    assert not masks.blocks

    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    exact_routing = routing._replace(weights=exact["weights"])
    exact_y = formula(exact["x"], exact_routing, keep, exact, experts.activation.name)
    (exact_y * grad).sum().backward()
    tolerance = 2e-2 if autocast or dtype == torch.bfloat16 else 1e-5
    pairs = {name: (leaf.grad, exact[name].grad) for name, leaf in leaves.items() if name not in frozen}
    for name, (got, want) in (pairs | {"y": (y, exact_y)}).items():
        error = (got.double() - want).norm() / want.norm().clamp_min(0.3)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [1, 2, N])
def test_equals_the_formula_for_the_same_masks(path, activation, gated, bias, k, monkeypatch):
    activation = torch.tanh if activation == "tanh" else activation
    check(monkeypatch, path, make(activation=activation, gated=gated, bias=bias), route(k))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gated", [False, True])
def test_absent_slots(path, gated, monkeypatch):
    check(monkeypatch, path, make(activation="gelu", gated=gated), route(3, absent=0.4))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16(path, activation, autocast, monkeypatch):
    experts = make(torch.float32 if autocast else torch.bfloat16, activation=activation, gated=True)
    check(monkeypatch, path, experts, route(2), autocast)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("d", [4, 16])
@pytest.mark.parametrize("frozen", ["", "weights", "weights down", "up down_bias"])
def test_narrow_and_wide_experts_of_which_parts_need_no_gradient(path, activation, d, frozen, monkeypatch):
    check(monkeypatch, path, make(d=d, activation=activation, gated=True), route(2), frozen=frozen.split())


def counting(path: str, p: float, dtype: torch.dtype = torch.float32) -> SMoE:
    """A layer whose output is, unit for unit, 1 / (1 - p) or 0: units of 1, the identity behind them."""
    layer = SMoE(D, N * D, N, 1, dropout=p, compute=path, seed=0).to(dtype)
    with torch.no_grad():
        layer.experts.up.zero_(), layer.experts.up_bias.fill_(1)
        layer.experts.down.copy_(torch.eye(D).expand(N, D, D)), layer.experts.down_bias.zero_()
    return layer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_scale_and_seed(path, p):
    layer, x = counting(path, p), torch.randn(3000, D)
    torch.manual_seed(2)
    y = layer(x)
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - p)), rtol=1e-4, atol=0)
    assert dropped.double().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / y.numel()) ** 0.5)
    neighbours = (dropped[1:] & dropped[:-1]).double().mean().item()
    assert neighbours == pytest.approx(p * p, abs=6 * (p * (1 - p) / y.numel()) ** 0.5)
    assert not torch.equal(layer(x), y)
    torch.manual_seed(2)
    assert torch.equal(layer(x), y)
    with torch.no_grad():
        assert (layer(x) == 0).any()
        assert (layer.eval()(x) == 1).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_rate_1_leaves_the_second_bias(path, activation):
    layer = SMoE(D, N * H, N, 2, dropout=1.0, activation=activation, compute=path, output_scale="k", score="sum")
    x = torch.randn(20, D, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    routing = layer.router(x)
    torch.testing.assert_close(y, 2 * layer.experts.down_bias[routing.indices].sum(1))
    assert (layer.experts.up.grad == 0).all() and (layer.experts.down.grad == 0).all() and (x.grad == 0).all()


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("way", ["checkpoint", "reentrant checkpoint", "kept graph"])
def test_recomputed_and_repeated_backward_have_the_same_masks(path, activation, way, monkeypatch):
    monkeypatch.setattr("smoe.compute.dense.ROWS_BYTES", 2000)  # several blocks of rows
    layer = SMoE(D, N * H, N, 2, dropout=P, activation=activation, gated=True, router="learned", compute=path, seed=0)
    x = torch.randn(TOKENS, D)

    def gradients(forward, repeat: bool = False) -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = forward(leaf)
        if repeat:
            y.square().sum().backward(retain_graph=True)
            layer.zero_grad()
            leaf.grad = None
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]

    want = gradients(layer)
    if way == "kept graph":
        got = gradients(layer, repeat=True)
    else:
        got = gradients(lambda leaf: checkpoint(layer, leaf, use_reentrant=way == "reentrant checkpoint"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_masks_are_drawn_for_present_pairs_only(monkeypatch):
    drawn = []
    monkeypatch.setattr("smoe.compute.hidden.keep_mask", lambda *args: drawn.append(args[0]) or keep_mask(*args))
    routing = route(3, absent=0.5)
    PATHS["grouped"](torch.randn(TOKENS, D).double(), make(torch.float64), routing)  # float64 needs no padding
    assert sum(rows for rows, _ in drawn) == (routing.indices >= 0).sum()


@pytest.mark.parametrize("path", ["reference", *FAST])
def test_compiled(path):
    torch.compiler.reset()
    layer, x = counting(path, P), torch.randn(2000, D, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    y = compiled(x)
    assert (y == 0).double().mean().item() == pytest.approx(P, abs=0.02)
    y.sum().backward()
    kept = (y.detach() != 0).sum() / (1 - P)  # every unit that was kept gives its weight in down a gradient
    torch.testing.assert_close(layer.experts.up_bias.grad.sum(), kept, rtol=1e-3, atol=0)
    layer.eval()
    assert (compiled(x) == 1).all()


def test_dropout_does_not_change_the_path(monkeypatch):
    for name in ("reference", "grouped_mm"):
        monkeypatch.setitem(PATHS, name, None)
    for k in (1, N):
        SMoE(D, N * H, N, k, dropout=P)(torch.randn(9, D))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", PATHS)
def test_on_cuda(path):
    dtype = torch.bfloat16 if path == "grouped_mm" else torch.float32
    layer, x = counting(path, P, dtype).cuda(), torch.randn(3000, D, dtype=dtype, device="cuda", requires_grad=True)
    y = layer(x)
    assert (y == 0).double().mean().item() == pytest.approx(P, abs=0.02)
    y.sum().backward()
    kept = (y.detach() != 0).sum() / (1 - P)
    torch.testing.assert_close(layer.experts.up_bias.grad.sum().float(), kept, rtol=2e-2, atol=0)
