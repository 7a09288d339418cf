"""Concrete Dropout against the paper's Algorithm 1; DropBlock's rate, blocks and expectation."""

import math

import pytest
import torch
from torch import nn

from smoe import ConcreteDropout, DropBlock


def algorithm_1(x, p_logit, next_layer, noise, weight_regularizer=1e-6, dropout_regularizer=1e-5):
    """The paper's Algorithm 1 in scalars and float64: (dropped x, penalty)."""
    p = 1 / (1 + torch.exp(-p_logit))
    tiny = 1e-7
    rows = []
    for row, row_noise in zip(x, noise, strict=True):
        values = []
        for value, u in zip(row, row_noise, strict=True):
            odds = torch.log((p + tiny) / (1 - p + tiny)) + torch.log((u + tiny) / (1 - u + tiny))
            values.append(value * (1 - 1 / (1 + torch.exp(-odds / 0.1))) / (1 - p))
        rows.append(torch.cat(values))
    square = sum((parameter.double() ** 2).sum() for parameter in next_layer.parameters())
    entropy = p * torch.log(p) + (1 - p) * torch.log(1 - p)
    return torch.stack(rows), weight_regularizer * square / (1 - p) + dropout_regularizer * x.shape[1] * entropy


@pytest.mark.parametrize("init_p", [0.05, 0.1, 0.5, 0.8])
def test_concrete_equals_algorithm_1(init_p):
    layer = ConcreteDropout(init_p, weight_regularizer=3e-3, dropout_regularizer=2e-2)
    following = nn.Linear(6, 3)
    x = torch.randn(4, 6, requires_grad=True)
    torch.manual_seed(9)
    noise = torch.rand(4, 6)
    torch.manual_seed(9)
    y = layer(x)
    penalty = layer.regularization(following, 6)
    direction = torch.randn(4, 6)
    ((y * direction).sum() + penalty).backward()

    p_logit = torch.tensor([math.log(init_p / (1 - init_p))], dtype=torch.float64, requires_grad=True)
    x2 = x.detach().double().requires_grad_()
    other = nn.Linear(6, 3)
    other.load_state_dict(following.state_dict())
    wanted, wanted_penalty = algorithm_1(x2, p_logit, other, noise.double(), 3e-3, 2e-2)
    ((wanted * direction.double()).sum() + wanted_penalty).backward()

    assert penalty.shape == ()
    for got, want in (
        (y, wanted),
        (x.grad, x2.grad),
        (layer.p_logit.grad, p_logit.grad),
        (penalty, wanted_penalty.squeeze()),
        (following.weight.grad, other.weight.grad),
        (following.bias.grad, other.bias.grad),
    ):
        torch.testing.assert_close(got.double(), want.double(), atol=2e-4, rtol=2e-4)


def test_concrete_penalty_pulls_p_the_right_way():
    layer = ConcreteDropout(0.3)
    big, none = nn.Linear(50, 50), nn.Linear(50, 50)
    nn.init.constant_(big.weight, 100.0)
    for parameter in none.parameters():
        nn.init.zeros_(parameter)
    (grad_big,) = torch.autograd.grad(layer.regularization(big, 50), layer.p_logit)
    (grad_none,) = torch.autograd.grad(layer.regularization(none, 50), layer.p_logit)
    assert grad_big > 0 > grad_none  # large weights pull p down, the entropy pulls it to 1/2


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_concrete_drops_about_p_and_keeps_the_expectation(p):
    layer = ConcreteDropout(p)
    y = layer(torch.ones(400, 500)).detach()
    assert (y < 0.5 / (1 - p)).double().mean().item() == pytest.approx(p, abs=0.01)
    # the relaxed mask is slightly biased: its mean is exactly 1 - p only at p = 1/2
    assert y.mean().item() == pytest.approx(1, abs=0.02)


def test_concrete_in_bfloat16_is_finite_and_trains():
    layer = ConcreteDropout(0.1).bfloat16()
    x = torch.ones(300, 300, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and layer.p.dtype == torch.float32
    y.float().square().mean().backward()
    assert layer.p_logit.grad.isfinite().all() and layer.p_logit.grad != 0 and x.grad.isfinite().all()
    assert y.float().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("layer", [ConcreteDropout(0.4), DropBlock(0.4), DropBlock(0.4, 1)], ids=str)
def test_identity_when_evaluating(layer):
    x = torch.randn(3, 5, 20)
    assert layer.eval()(x) is x
    y = layer.train()(x)
    assert y.shape == x.shape and not torch.equal(y, x)


@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20), (20,), (3, 2, 20)])
@pytest.mark.parametrize("layer", [ConcreteDropout(0.4), DropBlock(0.4)], ids=str)
def test_any_shape(layer, shape):
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    flipped = torch.randn(tuple(reversed(shape))).permute(*reversed(range(len(shape))))
    assert layer(flipped).shape == shape


# --- DropBlock -------------------------------------------------------------------------------------------------------


def runs_of_zeros(row: list[float]) -> list[tuple[int, int]]:
    """(start, length) of every run of zeros."""
    found, start = [], None
    for i, value in enumerate([*row, 1.0]):
        if value == 0 and start is None:
            start = i
        elif value != 0 and start is not None:
            found.append((start, i - start))
            start = None
    return found


@pytest.mark.parametrize("block_size", [1, 3, 7])
@pytest.mark.parametrize("drop_prob", [0.02, 0.1, 0.2])
def test_dropblock_share_and_expectation(drop_prob, block_size):
    y = DropBlock(drop_prob, block_size)(torch.ones(800, 512))
    share = (y == 0).double().mean().item()
    # the rate of Ghiasi et al. counts overlapping blocks twice, so about drop_prob^2 / 2 fewer features are dropped
    assert share == pytest.approx(drop_prob, rel=0.05 + drop_prob / 1.8)
    assert share < drop_prob * 1.03
    assert y.mean().item() == pytest.approx(1, abs=1e-4)
    assert y.unique().numel() == 2


@pytest.mark.parametrize("block_size", [3, 7])
def test_dropblock_drops_whole_blocks(block_size):
    y = DropBlock(0.1, block_size)(torch.ones(300, 64))
    runs = [run for row in y.tolist() for run in runs_of_zeros(row)]
    lengths = [length for _, length in runs]
    assert min(lengths) == block_size  # whole blocks only, also at the edges
    assert sum(length == block_size for length in lengths) > 0.6 * len(lengths)
    starts = {start for start, _ in runs}
    assert 0 in starts and 64 - block_size in starts


def test_dropblock_rows_are_independent():
    y = DropBlock(0.3, 7)(torch.ones(2000, 32)) == 0
    same = (y[:-1] == y[1:]).double().mean().item()
    p = y.double().mean(0)
    assert same == pytest.approx((p * p + (1 - p) ** 2).mean().item(), abs=0.02)


def test_block_size_1_is_dropout():
    layer = DropBlock(0.3, 1)
    assert layer.gamma(100) == pytest.approx(0.3)
    x = torch.randn(2000, 50)
    y = layer(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], (x / kept.double().mean().item())[kept])
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.01)
    neighbours = (kept[:, 1:] == kept[:, :-1]).double().mean().item()
    assert neighbours == pytest.approx(0.7**2 + 0.3**2, abs=0.01)
    assert all(abs(column - 0.7) < 0.06 for column in kept.double().mean(0).tolist())


@pytest.mark.parametrize("features", [1, 2, 3, 5, 6, 7, 8])
def test_dropblock_with_few_features(features):
    y = DropBlock(0.2, 7)(torch.ones(20_000, features))
    share = (y == 0).double().mean().item()
    assert share == pytest.approx(0.2, abs=0.03)
    assert y.mean().item() == pytest.approx(1, abs=1e-3)


def test_dropblock_edge_rates():
    x = torch.randn(4, 30)
    assert torch.equal(DropBlock(0.0)(x), x)
    assert DropBlock(0.999, 3)(torch.ones(1, 1)).isfinite().all()
    y = DropBlock(0.1)(torch.ones(200, 300, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.float().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "make", [lambda: ConcreteDropout(0.0), lambda: ConcreteDropout(1), lambda: ConcreteDropout(math.nan)]
)
def test_bad_init_p_is_named(make):
    with pytest.raises(ValueError, match="^init_p is (0.0|1|nan); .* between 0 and 1"):
        make()


@pytest.mark.parametrize("drop_prob", [-0.1, 1, math.nan])
def test_bad_drop_prob_is_named(drop_prob):
    with pytest.raises(ValueError, match=f"^drop_prob is {drop_prob}; "):
        DropBlock(drop_prob)


@pytest.mark.parametrize("block_size", [0, 2, -3, 2.5, 7.0, True])
def test_bad_block_size_is_named(block_size):
    with pytest.raises(ValueError, match=f"^block_size is {block_size}; .* odd number"):
        DropBlock(0.1, block_size)
