"""The fast paths under less usual features of PyTorch: strided tensors, hooks, checkpointing, second derivatives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from smoe import Routing, SMoE
from smoe.compute import PATHS
from smoe.experts import Experts

FAST = ["dense", "few", "grouped"]


def relu(x: torch.Tensor) -> torch.Tensor:
    """A user's function that has the name of one of ours."""
    return F.leaky_relu(x, 0.1)


def inputs(tokens: int = 30, d: int = 12) -> tuple[torch.Tensor, Routing, torch.Tensor]:
    torch.manual_seed(0)
    routing = Routing(torch.rand(tokens, 4).topk(2).indices, torch.rand(tokens, 2), None)
    return torch.randn(tokens, d), routing, torch.randn(tokens, d)


def experts(**options) -> Experts:
    torch.manual_seed(1)
    return Experts(4, 12, 6, **options)


def gradients(path: str, layer: Experts) -> list[torch.Tensor]:
    x, routing, grad = inputs()
    layer.zero_grad()
    leaf = x.requires_grad_()
    y = PATHS[path](leaf, layer, routing)
    y.backward(grad)
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("gated", [False, True])
def test_activation_named_like_one_of_ours(path, gated):
    layer = experts(activation=relu, gated=gated)
    assert_same(gradients(path, layer), gradients("reference", layer))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("gated", [False, True])
def test_activation_that_works_in_place(path, gated):
    layer = experts(activation=torch.nn.SiLU(inplace=True), gated=gated)
    assert_same(gradients(path, layer), gradients("reference", experts(activation="silu", gated=gated)))


def test_activation_with_parameters_is_refused():
    with pytest.raises(ValueError, match=r"activation is PReLU\(.*has parameters"):
        SMoE(12, 24, 4, activation=torch.nn.PReLU())


@pytest.mark.parametrize("path", FAST)
def test_parameters_that_are_not_contiguous(path):
    layer = experts(gated=True)
    for name, p in list(layer.named_parameters()):
        strided = p.detach().transpose(0, 1).contiguous().transpose(0, 1)
        setattr(layer, name, torch.nn.Parameter(strided))
    assert_same(gradients(path, layer), gradients("reference", experts(gated=True)))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("gated", [False, True])
def test_hooks_that_change_the_layout_of_saved_tensors(path, gated):
    layer = experts(activation="gelu", gated=gated)
    want = gradients("reference", layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.mT.contiguous() if t.dim() > 1 else t, _transposed):
        assert_same(gradients(path, layer), want)


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT if t.dim() > 1 else t


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("bias", [False, True])
def test_selective_checkpointing_of_products(path, bias):
    x, routing, grad = inputs()
    layer = experts(bias=bias)
    want = gradients("reference", layer)
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)
    layer.zero_grad()
    leaf = x.requires_grad_()
    y = checkpoint(lambda v: PATHS[path](v, layer, routing), leaf, use_reentrant=False, context_fn=contexts)
    y.backward(grad)
    assert_same([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())], want)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_over_a_kept_graph(path, reentrant):
    """The first backward must not overwrite what the second one needs."""
    x, routing, grad = inputs()
    layer = experts(activation="gelu", gated=True)
    want = gradients("reference", layer)
    leaf = x.requires_grad_()
    y = checkpoint(lambda v: PATHS[path](v, layer, routing), leaf, use_reentrant=reentrant)
    for keep in (True, False):
        layer.zero_grad()
        leaf.grad = None
        y.backward(grad, retain_graph=keep)
        assert_same([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())], want)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("frozen", [("up",), ("down",), ("gate", "up_bias"), ("up", "gate", "down")])
def test_frozen_parameters(path, frozen):
    layer = experts(activation="gelu", gated=True)
    want = dict(zip(("y", "x", *(n for n, _ in layer.named_parameters())), gradients("reference", layer), strict=True))
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x, routing, grad = inputs()  # x itself needs no gradient
    layer.zero_grad()
    PATHS[path](x, layer, routing).backward(grad)
    for name, p in layer.named_parameters():
        assert (p.grad is None) == (name in frozen)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("need_weights", [False, True])
def test_frozen_matrices_cost_no_products(path, need_weights):
    layer = experts(activation="gelu", gated=True)
    found = []
    for frozen in ((), ("down",), ("up", "gate"), ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")):
        for name, p in layer.named_parameters():
            p.requires_grad_(name not in frozen)
        x, routing, grad = inputs()
        x.requires_grad_()
        y = PATHS[path](x, layer, routing._replace(weights=routing.weights.requires_grad_(need_weights)))
        with FlopCounterMode(display=False) as counter:
            y.backward(grad)
        found.append((counter.get_total_flops(), x.grad, routing.weights.grad))
    every, no_down, no_up, nothing = (flops for flops, _, _ in found)
    assert every > no_down > no_up > nothing and nothing < 0.6 * every
    for _, grad_x, grad_weights in found:
        torch.testing.assert_close(grad_x, found[0][1])
        torch.testing.assert_close(grad_weights, found[0][2])


@pytest.mark.parametrize("path", FAST)
def test_second_derivative_of_a_sum_raises(path):
    """The gradient of the output is constant there, so autograd would not see that the first derivative uses x."""
    layer = SMoE(12, 24, 4, 2, activation="gelu", compute=path, seed=0)
    x = torch.randn(20, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_custom_activation_under_compile(path, tokens):
    torch.compiler.reset()
    layer = SMoE(12, 24, 4, 2, activation=torch.tanh, compute=path, seed=0)
    compiled = torch.compile(layer, backend="aot_eager")
    found = []
    for forward in (compiled, layer):
        torch.manual_seed(0)
        x = torch.randn(tokens, 12, requires_grad=True)
        y = forward(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert_same(*found)


@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_the_operator_returns_the_layout_that_it_declares(path):
    """For inputs and parameters of any strides, and without anything kept for backward."""
    from smoe.compute.compiled import experts_op

    x, routing, _ = inputs()
    layer = experts(gated=True)
    weights, indices = (routing.weights, routing.indices) if path == "grouped" else (torch.rand(30, 4), None)
    strided = x.t().contiguous().t().requires_grad_()
    up = layer.up.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    rest = (layer.up_bias, layer.gate, layer.gate_bias, layer.down, layer.down_bias)
    arguments = (path, strided, weights.requires_grad_(), indices, "gelu", True, up, *rest)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(experts_op, arguments, test_utils=checks)
    with torch.no_grad():
        y, kept = experts_op(*arguments[:5], False, up, *rest)
    assert kept.numel() == 0
    torch.testing.assert_close(y, experts_op(*arguments)[0])


def test_grouped_mm_without_tokens_gives_every_parameter_a_gradient():
    weights = torch.rand(0, 2, requires_grad=True)
    routing = Routing(torch.zeros(0, 2, dtype=torch.int64), weights, None)
    layer = Experts(4, 16, 8)
    PATHS["grouped_mm"](torch.randn(0, 16), layer, routing).sum().backward()
    assert weights.grad is not None and all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(("d", "h", "name"), [(6, 8, "d_model is 6"), (8, 6, "an expert's hidden width is 6")])
def test_grouped_mm_names_the_width_it_cannot_take(d, h, name):
    layer = SMoE(d, 4 * h, 4, 2, compute="grouped_mm")
    with pytest.raises(ValueError, match=f"{name}; compute 'grouped_mm' needs a multiple of 4 in torch.float32"):
        layer(torch.randn(3, d))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_input_that_is_no_floating_point(dtype):
    with pytest.raises(ValueError, match=f"x is {dtype}; it must have a floating-point dtype"):
        SMoE(12, 24, 4, 2)(torch.ones(3, 12, dtype=dtype))


def test_input_without_a_dimension():
    with pytest.raises(ValueError, match="x has no features; its last dimension must be d_model = 12"):
        SMoE(12, 24, 4, 2)(torch.tensor(1.0))


def test_grouped_mm_names_the_dtype_it_cannot_take():
    with pytest.raises(ValueError, match="x is torch.float64; compute 'grouped_mm' takes 16 or 32 bits"):
        SMoE(16, 32, 4, 2, compute="grouped_mm").double()(torch.randn(3, 16, dtype=torch.float64))


def test_input_on_the_meta_device():
    with pytest.raises(ValueError, match="x is on the meta device, without values to route by; smoe.flops.count takes"):
        SMoE(12, 24, 4, 2).to("meta")(torch.randn(3, 12, device="meta"))
