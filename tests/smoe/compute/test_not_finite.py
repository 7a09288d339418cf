"""NaN and infinity appear where they do with the reference path, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from smoe import Routing, SMoE
from smoe.compute import PATHS
from smoe.router import PartialRouting

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def broken_rows(path: str, x: torch.Tensor, grad: torch.Tensor, routing: Routing, layer: SMoE) -> dict[str, list[int]]:
    """The rows (tokens or experts) of the output and of each gradient that are not all finite."""
    layer.zero_grad()
    leaf, weights = x.clone().requires_grad_(), routing.weights.clone().requires_grad_()
    y = PATHS[path](leaf, layer.experts, routing._replace(weights=weights))
    y.backward(grad)
    found = {"y": y, "x": leaf.grad, "weights": weights.grad} | {n: p.grad for n, p in layer.experts.named_parameters()}
    return {name: (~t.flatten(1).isfinite().all(1)).nonzero().flatten().tolist() for name, t in found.items()}


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("where", ["x", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@DTYPES
def test_a_token_that_is_not_finite_reaches_its_own_experts_alone(dtype, value, where, absent):
    """It spreads neither through the padding of an expert's rows nor through the weight 0 of absent slots."""
    torch.manual_seed(0)
    layer = SMoE(16, 4 * 8, 4, activation="gelu", bias=False, seed=1).to(dtype)
    indices = torch.rand(60, 4).argsort(1)[:, :2]
    if absent:
        indices[torch.rand(60, 2) < 0.4] = -1
    indices[0] = torch.tensor([0, 1])
    routing = (PartialRouting if absent else Routing)(indices, torch.rand(60, 2), None)
    x, grad = torch.randn(60, 16, dtype=dtype), torch.randn(60, 16, dtype=dtype)
    (x if where == "x" else grad)[0, 3] = value
    want = broken_rows("reference", x, grad, routing, layer)
    assert want["up"] == [0, 1] and want["x"] == [0]
    assert broken_rows("grouped", x, grad, routing, layer) == want


@pytest.mark.parametrize("path", ["grouped", "dense", "few"])
@pytest.mark.parametrize("where", ["x", "weight", "infinite weight"])
@pytest.mark.parametrize("tokens", [20, 2000])
@pytest.mark.parametrize("gated", [False, True])
@DTYPES
def test_relu_hides_no_nan(dtype, gated, tokens, where, path):
    """oneDNN's ReLU turns NaN into 0 where it is fused with the product; with few hidden units and with many."""
    torch.manual_seed(0)
    layer = SMoE(64, 4 * 64, 4, 3 if path == "grouped" else 4, gated=gated, seed=1).to(dtype)
    x = torch.randn(tokens, 64, dtype=dtype)
    broken = {"x": x[5], "weight": (layer.experts.gate if gated else layer.experts.up).data[:, 7]}
    broken.get(where, broken["weight"])[0] = float("inf" if "infinite" in where else "nan")
    if "infinite" in where:
        x[:, 0] = 0  # 0 times infinity
    layer.compute = "reference"
    want = layer(x).isfinite().all(1)
    layer.compute = path
    assert not want.all() and torch.equal(layer(x).isfinite().all(1), want)
    with torch.no_grad():
        assert torch.equal(layer(x).isfinite().all(1), want)
