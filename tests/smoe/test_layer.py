"""The layer against a loop over tokens written straight from the formula, in float64."""

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from smoe import SMoE, merge, record_routing, split
from smoe.compute import PATHS
from smoe.router import ROUTERS, SCORES

D, H, N, V = 12, 40, 10, 20
ACTIVATE = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


def naive(layer: SMoE, x: torch.Tensor, indices: torch.Tensor, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """y[t] = scale * sum_j w_tj E_j(x_t), token by token; of the layer's own routing only the ``indices`` are used."""
    k, scale = indices.shape[1], {"k": indices.shape[1], "num_experts": N}.get(layer.output_scale, layer.output_scale)
    has_logits = "router.weight" in leaves
    ys = []
    for t in range(x.shape[0]):
        chosen = indices[t].tolist()
        logits = leaves["router.weight"] @ x[t] + leaves["router.bias"] if has_logits else torch.zeros(N).double()
        exps = [torch.exp(logit) for logit in logits]
        y = torch.zeros(D, dtype=torch.float64)
        for e in chosen:
            below = {"softmax_after_topk": chosen, "softmax_before_topk": range(N)}.get(layer.router.score)
            weight = 1.0 if below is None else exps[e] / sum(exps[other] for other in below)
            hidden = leaves["experts.up"][e] @ x[t]
            if "experts.up_bias" in leaves:
                hidden = hidden + leaves["experts.up_bias"][e]
            act = ACTIVATE[str(layer.experts.activation)]
            if "experts.gate" in leaves:
                hidden = act(leaves["experts.gate"][e] @ x[t] + leaves["experts.gate_bias"][e]) * hidden
            else:
                hidden = act(hidden)
            out = hidden @ leaves["experts.down"][e]
            if "experts.down_bias" in leaves:
                out = out + leaves["experts.down_bias"][e]
            y = y + weight * out
        assert len(chosen) == len(set(chosen)) == k
        ys.append(scale * y)
    return torch.stack(ys)


def make(router="random", score="softmax_after_topk", k=3, **options) -> SMoE:
    layer = SMoE(D, H, N, k, router=router, score=score, vocab_size=V, seed=1, **options)
    if router in ("random", "learned"):  # at 0.02 all weights are about equal, which would hide a wrong score rule
        with torch.no_grad():
            layer.router.weight.mul_(50)
            layer.router.bias.normal_()
    return layer


def check(layer: SMoE, x: torch.Tensor, ids: torch.Tensor | None = None, tolerance: float = 1e-5) -> torch.Tensor:
    """Compares the output and every gradient with ``naive``; returns the chosen indices."""
    x = x.requires_grad_()
    with record_routing(layer) as routings:
        y = layer(x, token_ids=ids)
    direction = torch.randn(y.shape)
    (y * direction).sum().backward()
    (routing,) = routings
    flat = x.detach().reshape(-1, D)
    if layer.router.__class__.__name__ in (
        "RandomRouter",
        "LearnedRouter",
    ):  # the k largest logits
        logits = flat.double() @ layer.router.weight.detach().double().t() + layer.router.bias.detach().double()
        for t in range(flat.shape[0]):
            largest = sorted(range(N), key=lambda e: -logits[t, e].item())[: layer.top_k]  # noqa: B023
            assert set(routing.indices[t].tolist()) == set(largest)

    leaves = {
        name: p.detach().double().requires_grad_() for name, p in layer.state_dict().items() if p.is_floating_point()
    }
    flat = flat.double().requires_grad_()
    expected = naive(layer, flat, routing.indices, leaves)
    (expected * direction.reshape(-1, D).double()).sum().backward()

    close = functools.partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    close(y.reshape(-1, D).double(), expected)
    close(x.grad.reshape(-1, D).double(), flat.grad)
    for name, parameter in layer.named_parameters():
        wanted = leaves[name].grad
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(got.double(), torch.zeros_like(leaves[name]) if wanted is None else wanted, msg=lambda m: f"{name}: {m}")  # noqa: B023
    return routing.indices


@pytest.mark.parametrize("compute", ["auto", "reference"])
@pytest.mark.parametrize("k", [1, 3, N // 2, N])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_naive_loop(router, score, k, compute):
    ids = torch.randint(V, (2, 9))
    check(make(router, score, k, compute=compute), torch.randn(2, 9, D), ids)


@pytest.mark.parametrize("compute", ["auto", *PATHS])
@pytest.mark.parametrize("k", [1, 3, N])
@pytest.mark.parametrize(
    "options",
    [{"activation": "gelu"}, {"activation": "silu", "gated": True}, {"bias": False}],
    ids=["gelu", "gated", "no_bias"],
)
def test_expert_kinds_equal_naive_loop(options, k, compute):
    check(make("learned", k=k, compute=compute, **options), torch.randn(15, D))


@pytest.mark.parametrize("scale", [1, 2.5, "k", "num_experts"])
@pytest.mark.parametrize("k", [1, 3, N])
def test_output_scale(scale, k):
    layer = make("learned", k=k, output_scale=scale)
    check(layer, torch.randn(8, D))
    assert layer.scale == {"k": k, "num_experts": N}.get(scale, scale)


@pytest.mark.parametrize("compute", ["auto", "reference"])
@pytest.mark.parametrize("router", ROUTERS)
def test_experts_without_tokens(router, compute):
    layer = make(router, k=1, compute=compute)
    indices = check(layer, torch.randn(2, D), torch.tensor([3, 3]))
    idle = sorted(set(range(N)) - set(indices.flatten().tolist()))
    assert len(idle) >= N - 2
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None and (parameter.grad[idle] == 0).all()


def test_input_that_is_not_contiguous():
    layer = make("learned", "softmax_before_topk")
    x = torch.randn(D, 4, 6)
    check(layer, x.permute(2, 1, 0).detach())
    assert not x.permute(2, 1, 0).is_contiguous()
    wide = torch.randn(5, 3 * D)
    torch.testing.assert_close(layer(wide[:, ::3]), layer(wide[:, ::3].contiguous()))


def test_any_number_of_leading_dimensions():
    layer = make()
    x = torch.randn(2, 3, 4, D)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x[1, 2, 3]), y[1, 2, 3])
    torch.testing.assert_close(layer(x[1, 2]), y[1, 2])


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_no_tokens(router, shape):
    layer = make(router)
    x = torch.randn(*shape, D, requires_grad=True)
    with record_routing(layer) as (routings):
        y = layer(x, token_ids=torch.zeros(shape, dtype=torch.int64))
    loss = y.sum() if routings[0].balance_loss is None else y.sum() + routings[0].balance_loss
    loss.backward()
    assert y.shape == x.shape == x.grad.shape
    for parameter in layer.parameters():
        assert parameter.grad is None or (parameter.grad == 0).all()


def dense_of(layer: SMoE):
    """The dense MLP with the layer's weights, as two ``nn.Linear``."""
    weights = merge(layer.experts)
    up, down = torch.nn.Linear(D, H), torch.nn.Linear(H, D)
    up.load_state_dict({"weight": weights["up_weight"], "bias": weights["up_bias"]})
    down.load_state_dict({"weight": weights["down_weight"], "bias": weights["down_bias"]})
    return up, down


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("score", SCORES)
def test_one_expert_is_the_dense_mlp(router, score):
    layer = SMoE(D, H, 1, router=router, score=score, vocab_size=V)
    up, down = dense_of(layer)
    x = torch.randn(7, D, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    direction = torch.randn(7, D)
    y = layer(x, token_ids=torch.randint(V, (7,)))
    y_dense = down(torch.relu(up(x_dense)))
    (y * direction).sum().backward()
    (y_dense * direction).sum().backward()
    for got, wanted in (
        (y, y_dense),
        (x.grad, x_dense.grad),
        (layer.experts.up.grad[0], up.weight.grad),
        (layer.experts.up_bias.grad[0], up.bias.grad),
        (layer.experts.down.grad[0], down.weight.grad.t()),
        (layer.experts.down_bias.grad[0], down.bias.grad),
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_experts", [2, 5, 40])
def test_sum_of_all_experts_is_the_dense_mlp(router, num_experts):
    up, down = torch.nn.Linear(D, H), torch.nn.Linear(H, D)
    layer = SMoE(D, H, num_experts, router=router, score="sum", vocab_size=V)
    weights = {"up_weight": up.weight, "up_bias": up.bias, "down_weight": down.weight, "down_bias": down.bias}
    split(layer.experts, weights)
    x = torch.randn(9, D)
    y = layer(x, token_ids=torch.randint(V, (9,)))
    torch.testing.assert_close(y, down(torch.relu(up(x))), atol=1e-5, rtol=1e-5)


def test_top_k_lives_in_one_place():
    layer = make(k=3)
    layer.top_k = 5
    assert layer.router.top_k == 5
    layer.router.top_k = 2
    x = torch.randn(4, D)
    with record_routing(layer) as routings:
        layer(x)
    assert layer.top_k == 2 and routings[0].indices.shape == (4, 2)
    check(layer, x)


def test_default_top_k_is_all_experts():
    assert SMoE(D, H, N).top_k == N


def test_state_dict_round_trip_gives_the_same_layer():
    for router in ("random", "learned", "hash"):
        one, two = (SMoE(D, H, N, 3, router=router, vocab_size=V, seed=seed) for seed in (1, 2))
        x, ids = torch.randn(30, D), torch.randint(V, (30,))
        assert not torch.equal(one.router(x, ids).indices, two.router(x, ids).indices)
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(x, ids), two(x, ids))


def test_deepcopy_is_equal_and_apart():
    layer = make("learned")
    other = copy.deepcopy(layer)
    x = torch.randn(4, D)
    assert torch.equal(layer(x), other(x))
    other.top_k = 1
    assert layer.top_k == 3
    with record_routing(layer) as routings:
        other(x)
    assert routings == []


@pytest.mark.parametrize("compute", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_model_in_another_dtype(dtype, compute):
    layer = make(compute=compute)
    x = torch.randn(50, D).to(dtype)  # the same rounded input for both
    exact, indices = layer(x.float()), layer.router(x.float()).indices
    layer.to(dtype)
    assert torch.equal(layer.router(x).indices, indices)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(y.float(), exact, atol=tolerance, rtol=tolerance)


def test_routing_is_float32_under_autocast():
    layer = make("learned", "softmax_before_topk")
    x = torch.randn(200, D)
    wanted = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with record_routing(layer) as routings:
            layer(x)
        assert layer.router.logits(x).dtype == torch.float32
    assert torch.equal(routings[0].indices, wanted.indices)
    assert torch.equal(routings[0].weights, wanted.weights)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluating_computes_the_same(mode):
    layer = make()
    x = torch.randn(6, D)
    wanted = layer(x)
    layer.eval()
    with mode():
        y = layer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, wanted.detach())


def test_reset_redraws_what_is_trained_and_keeps_a_fixed_router():
    for router in ("random", "learned"):
        layer = make(router)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.reset_parameters(0.01)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]) == (router == "random" and name.startswith("router")), name
        assert math.isclose(layer.experts.up.std().item(), 0.01, rel_tol=0.2)
        assert (layer.experts.up_bias == 0).all()


BAD = [
    ({"top_k": 0}, "top_k", "0"),
    ({"top_k": N + 1}, "top_k", str(N + 1)),
    ({"top_k": -1}, "top_k", "-1"),
    ({"top_k": True}, "top_k", "True"),
    ({"top_k": 2.0}, "top_k", "2.0"),
    ({"num_experts": 7}, "d_hidden", "40"),
    ({"num_experts": 0}, "num_experts", "0"),
    ({"num_experts": True}, "num_experts", "True"),
    ({"num_experts": 80}, "d_hidden", "40"),
    ({"d_hidden": 0}, "d_hidden", "0"),
    ({"d_hidden": 40.0}, "d_hidden", "40.0"),
    ({"router": "smart"}, "router", "smart"),
    ({"score": "max"}, "score", "max"),
    ({"output_scale": "n"}, "output_scale", "n"),
    ({"output_scale": 0}, "output_scale", "0"),
    ({"output_scale": True}, "output_scale", "True"),
    ({"output_scale": math.nan}, "output_scale", "nan"),
    ({"activation": "tanhh"}, "activation", "tanhh"),
    ({"activation": 3}, "activation", "3"),
    ({"engine": "warp"}, "engine", "warp"),
    ({"compute": "fast"}, "compute", "fast"),
    ({"router": "hash"}, "vocab_size", "None"),
    ({"router": "hash", "vocab_size": 0}, "vocab_size", "0"),
    ({"router": "hash", "vocab_size": True}, "vocab_size", "True"),
]


@pytest.mark.parametrize(("options", "field", "value"), BAD)
def test_bad_options_are_named_in_one_line(options, field, value):
    with pytest.raises(ValueError) as error:
        SMoE(**{"d_model": D, "d_hidden": H, "num_experts": N, **options})
    message = str(error.value)
    assert field in message and value in message and "\n" not in message


def test_bad_input_width_is_named():
    with pytest.raises(ValueError, match=f"{D + 1} features.*d_model = {D}"):
        make()(torch.randn(3, D + 1))


@pytest.mark.parametrize("k", [0, N + 1, True, 1.5, "3"])
def test_a_refused_k_changes_nothing(k):
    layer = make(k=3)
    with pytest.raises(ValueError, match="top_k is"):
        layer.top_k = k
    assert layer.top_k == 3


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", torch.nn.functional.softplus])
def test_a_layer_can_be_pickled_and_copied(activation):
    layer = SMoE(16, 64, 8, 3, activation=activation)
    x = torch.randn(5, 16)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
