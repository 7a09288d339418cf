"""The six methods: what they build and what they minimise."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smoe import METHODS, ConcreteDropout, DenseMLP, DropBlock, LearnedRouter, SMoE, get_method, record_routing
from smoe.methods import MethodName, concrete_regularization, symmetric_kl
from smoe.router import RandomRouter, UniformRouter

D, H, CLASSES = 12, 32, 7
DROPOUTS = (nn.Dropout, ConcreteDropout, DropBlock)


class Model(nn.Module):
    """Residual MLPs and a classifier; keeps the output of every pass."""

    def __init__(self, method, layers=2, **options):
        super().__init__()
        self.mlps = nn.ModuleList(method.make_mlp(D, H, num_experts=4, **options) for _ in range(layers))
        self.head = nn.Linear(D, CLASSES)
        self.passes = []

    def forward(self, x, y):
        for mlp in self.mlps:
            x = x + mlp(x)
        logits = self.head(x)
        output = SimpleNamespace(loss=F.cross_entropy(logits, y), logits=logits)
        self.passes.append(output)
        return output


def run(name, model=None, **weights):
    method = METHODS[name]
    model = Model(method) if model is None else model
    x, y = torch.randn(20, D), torch.randint(CLASSES, (20,))
    return model, method.loss(model, lambda: model(x, y), **weights)


def test_the_rows_of_table_1():
    assert (
        list(METHODS)
        == list(get_args(MethodName))
        == [
            "dense_dropout",
            "dense_concrete_dropout",
            "dense_dropblock",
            "thor",
            "smoe",
            "smoe_dropout",
        ]
    )
    assert all(method.name == name == get_method(name).name and method.title for name, method in METHODS.items())
    assert [name for name, method in METHODS.items() if method.routed] == ["thor", "smoe", "smoe_dropout"]


@pytest.mark.parametrize("name", METHODS)
def test_k_of_every_method(name):
    method = METHODS[name]
    for n in (1, 2, 3, 4, 16):
        assert 1 <= method.k_min(n) <= method.k_max(n) <= n
    wanted = {"thor": ("constant", 2, 2), "smoe": ("constant", 2, 2), "smoe_dropout": ("linear", 8, 16)}
    if name in wanted:
        assert (method.schedule, method.k_min(16), method.k_max(16)) == wanted[name]


@pytest.mark.parametrize(
    ("name", "kind"), [("thor", UniformRouter), ("smoe", LearnedRouter), ("smoe_dropout", RandomRouter)]
)
def test_routed_methods_build_smoe_layers(name, kind):
    layer = METHODS[name].make_mlp(D, H, num_experts=4)
    assert isinstance(layer, SMoE) and type(layer.router) is kind
    assert layer.top_k == METHODS[name].k_max(4) and layer.num_experts == 4 and layer.d_hidden == H
    assert not any(isinstance(module, DROPOUTS) for module in layer.modules())
    assert layer(torch.randn(3, 5, D)).shape == (3, 5, D) and layer.experts.dropout == 0
    assert METHODS[name].make_mlp(D, H, num_experts=4, dropout=0.3, expert_dropout=0.2).experts.dropout == 0.2
    changed = METHODS[name].make_mlp(D, H, num_experts=4, router="hash", vocab_size=9, top_k=1, score="sum")
    assert changed.needs_token_ids and changed.top_k == 1 and changed.router.score == "sum"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dense_dropout", nn.Dropout), ("dense_concrete_dropout", ConcreteDropout), ("dense_dropblock", DropBlock)],
)
def test_dense_methods_have_one_dropout_of_the_right_kind(name, kind):
    mlp = METHODS[name].make_mlp(D, H, dropout=0.2)
    assert isinstance(mlp, DenseMLP)
    (dropout,) = [module for module in mlp.modules() if isinstance(module, DROPOUTS)]
    assert isinstance(dropout, kind)
    rate = {nn.Dropout: "p", ConcreteDropout: "p", DropBlock: "drop_prob"}[kind]
    assert torch.as_tensor(getattr(dropout, rate)).item() == pytest.approx(0.2)
    mlp.eval()
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(mlp(x), mlp.down(torch.relu(mlp.up(x))))
    # it acts on the hidden units, after the activation
    seen = []
    dropout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mlp(x)
    torch.testing.assert_close(seen[0], torch.relu(mlp.up(x)))


@pytest.mark.parametrize(
    ("name", "parts", "passes"),
    [
        ("dense_dropout", set(), 1),
        ("dense_concrete_dropout", {"concrete"}, 1),
        ("dense_dropblock", set(), 1),
        ("thor", {"consistency"}, 2),
        ("smoe", {"balance"}, 1),
        ("smoe_dropout", set(), 1),
    ],
)
def test_loss_parts_and_passes(name, parts, passes):
    model, loss = run(name)
    assert set(loss.parts) == parts and len(model.passes) == passes
    assert loss.output is model.passes[0]
    assert all(part.shape == () and part.isfinite() for part in loss.parts.values())
    loss.total.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
    if not parts:
        assert torch.equal(loss.total, loss.task)


def test_thor_is_two_passes_and_the_symmetric_kl():
    model, loss = run("thor")
    first, second = model.passes
    assert not torch.equal(first.logits, second.logits)
    a, b = (F.log_softmax(one.logits, -1) for one in (first, second))
    wanted = (
        F.kl_div(a, b, reduction="batchmean", log_target=True) + F.kl_div(b, a, reduction="batchmean", log_target=True)
    ) / 2
    torch.testing.assert_close(loss.parts["consistency"], wanted)
    torch.testing.assert_close(loss.task, (first.loss + second.loss) / 2)
    torch.testing.assert_close(loss.total, loss.task + 2 * wanted)
    _, other = run("thor", model, consistency_weight=5.0)
    torch.testing.assert_close(other.total, other.task + 5 * other.parts["consistency"])
    _, single = run("thor", model, consistency_weight=0.0)
    assert single.parts == {} and len(model.passes) == 5


def test_symmetric_kl_value_gradient_and_shape():
    a, b = (torch.randn(2, 3, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = symmetric_kl(a, b)
    p, q = torch.softmax(a, -1), torch.softmax(b, -1)
    wanted = (p * (p / q).log() + q * (q / p).log()).sum(-1).mean() / 2
    for one, two in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(wanted, (a, b)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
        assert one.abs().sum() > 0
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-5)
    assert symmetric_kl(a, a).item() == 0
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(b, a))


def test_learned_balance_loss_is_the_sum_over_layers():
    method = METHODS["smoe"]
    model = Model(method, layers=3)
    x, y = torch.randn(20, D), torch.randint(CLASSES, (20,))
    with record_routing(model) as routings:
        task = model(x, y).loss
    wanted = sum(routing.balance_loss for routing in routings)
    assert len(routings) == 3 and wanted > 2.5
    loss = method.loss(model, lambda: model(x, y))
    torch.testing.assert_close(loss.parts["balance"], wanted)
    torch.testing.assert_close(loss.total, task + 0.01 * wanted)
    torch.testing.assert_close(method.loss(model, lambda: model(x, y), balance_weight=3.0).total, task + 3 * wanted)
    assert method.loss(model, lambda: model(x, y), balance_weight=0.0).parts == {}


def test_balance_loss_is_a_mean_over_passes():
    model = Model(METHODS["thor"], router="learned")  # which routes both passes alike
    x, y = torch.randn(20, D), torch.randint(CLASSES, (20,))
    losses = [
        METHODS["thor"].loss(model, lambda: model(x, y), balance_weight=1.0, consistency_weight=weight).parts["balance"]
        for weight in (0.0, 2.0)
    ]
    torch.testing.assert_close(*losses)


def test_concrete_penalty_is_the_sum_over_mlps():
    model, loss = run("dense_concrete_dropout")
    wanted = 0.0
    for mlp in model.mlps:
        p = torch.sigmoid(mlp.dropout.p_logit).squeeze()
        square = mlp.down.weight.square().sum() + mlp.down.bias.square().sum()
        wanted = wanted + 1e-6 * square / (1 - p) + 1e-5 * H * (p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(loss.parts["concrete"], wanted)
    torch.testing.assert_close(loss.total, loss.task + wanted)


def test_concrete_penalty_of_a_model_without_any_is_an_error():
    with pytest.raises(ValueError, match="^Linear has no DenseMLP with ConcreteDropout"):
        concrete_regularization(nn.Linear(2, 2))


def test_unknown_names_are_listed():
    with pytest.raises(ValueError) as error:
        get_method("smoe-dropout")
    assert all(word in str(error.value) for word in ("method is 'smoe-dropout'", *METHODS))
    with pytest.raises(ValueError, match="activation is 'mish'; .*relu"):
        METHODS["dense_dropout"].make_mlp(D, H, activation="mish")
    with pytest.raises(ValueError, match="router is 'mine'"):
        METHODS["smoe"].make_mlp(D, H, num_experts=4, router="mine")


def test_a_dense_method_takes_no_options_of_experts():
    for options in ({"top_k": 2}, {"router": "hash"}, {"tpo_k": 2}):
        with pytest.raises(ValueError, match="dense_dropout has none"):
            METHODS["dense_dropout"].make_mlp(D, H, **options)


def test_concrete_dropout_cannot_learn_from_a_rate_of_0():
    with pytest.raises(ValueError, match="dropout is 0"):
        METHODS["dense_concrete_dropout"].make_mlp(D, H, dropout=0.0)
    assert METHODS["dense_concrete_dropout"].make_mlp(D, H, dropout=0.2).dropout.p.item() == pytest.approx(0.2)
