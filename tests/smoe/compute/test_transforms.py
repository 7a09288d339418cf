"""A layer under torch.func, torch.compile and torch.jit.trace: the same numbers, or one line that says why not."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from smoe import SMoE


def make(compute: str, dtype: torch.dtype) -> tuple[SMoE, torch.Tensor]:
    torch.manual_seed(0)
    return SMoE(16, 4 * 8, 4, 2, router="learned", compute=compute, seed=1).to(dtype), torch.randn(9, 16, dtype=dtype)


@pytest.mark.parametrize("compute", ["auto", "grouped", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_torch_func(compute, dtype):
    layer, x = make(compute, dtype)
    parameters = dict(layer.named_parameters())
    layer(x).float().square().sum().backward()
    found = grad(lambda p: functional_call(layer, p, (x,)).float().square().sum())(parameters)
    for name, p in parameters.items():
        assert (found[name] - p.grad).norm() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * p.grad.norm(), name


def test_jvp():
    layer, x = make("auto", torch.float32)
    y, tangent = jvp(layer, (x,), (torch.ones_like(x),))
    leaf, grad_y = x.clone().requires_grad_(), torch.randn_like(x)
    expected = layer(leaf)
    expected.backward(grad_y)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close((tangent * grad_y).sum(), leaf.grad.sum())


@pytest.mark.parametrize("function", [lambda layer: layer, lambda layer: grad(lambda x: layer(x).sum())])
def test_vmap_says_why_not(function):
    layer, x = make("auto", torch.float32)
    with pytest.raises(ValueError, match="torch.func.vmap over an SMoE layer can't work"):
        vmap(function(layer))(x.view(3, 3, 16))


def test_three_graphs_serve_every_k():
    """With the setting from the layer's docstring; without it PyTorch stops compiling after 8 values of k."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    layer = SMoE(16, 12 * 8, 12, 1, compute="grouped", seed=1)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for k in range(1, 13):
            layer.top_k = k
            x = torch.randn(9, 16)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("compute", ["auto", "grouped", "dense"])
def test_a_trace_holds_for_other_inputs(compute):
    layer, x = make(compute, torch.float32)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        for other in (torch.randn(9, 16), torch.randn(4, 16)):
            torch.testing.assert_close(traced(other), layer(other))
