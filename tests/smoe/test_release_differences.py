"""Where we follow the cited papers and the official release computes something else: our value, and the ratio."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from smoe import METHODS, LearnedRouter, parameter_groups
from smoe.losses import concrete_regularization, symmetric_kl


def test_thors_consistency_is_a_sum_over_classes_halved():
    """The release takes the mean over classes and does not halve: V / 2 times smaller, 102 for 204 symbols."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 204, dtype=torch.float64)
    p, q = a.softmax(-1), b.softmax(-1)
    both = p * (p / q).log() + q * (q / p).log()
    ours = symmetric_kl(a, b).double()
    assert ours.item() == pytest.approx((both.sum(-1) / 2).mean().item(), rel=1e-5)
    assert (ours / both.mean()).item() == pytest.approx(102, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_balance_loss_is_1_when_balanced_whatever_k(k):
    """Fedus et al. 2021, Eq. 4, over (token, slot) pairs. The release divides the probabilities by T k instead of T."""
    torch.manual_seed(0)
    router = LearnedRouter(8, 6, k, seed=0)
    x = torch.randn(40, 8)
    routing = router(x)
    probabilities = router.logits(x).softmax(-1)
    share = torch.bincount(routing.indices.flatten(), minlength=6) / (40 * k)
    released = 6 * (share * probabilities.sum(0) / (40 * k)).sum()
    assert routing.balance_loss.item() == pytest.approx(k * released.item(), rel=1e-5)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.zero_()
    assert router(x).balance_loss.item() == pytest.approx(1, rel=1e-6)


def test_concrete_dropouts_penalty_counts_the_width_whatever_the_input():
    """Gal et al. 2017: one mask unit per hidden unit. `input[0].numel()` of their code is T x H for (B, T, H)."""
    mlp = METHODS["dense_concrete_dropout"].make_mlp(d_model=8, d_hidden=32, dropout=0.1)
    squares = sum(parameter.double().pow(2).sum().item() for parameter in mlp.down.parameters())
    entropy = 0.1 * math.log(0.1) + 0.9 * math.log(0.9)
    expected = mlp.dropout.weight_regularizer * squares / 0.9 + mlp.dropout.dropout_regularizer * 32 * entropy
    for shape in ((3, 8), (2, 5, 8), (2, 50, 8)):
        mlp(torch.randn(shape))
        assert concrete_regularization(mlp).item() == pytest.approx(expected, rel=1e-4)


def test_a_learned_dropout_rate_is_not_decayed():
    """Weight decay would pull its logit to 0, a rate of one half."""
    mlp = METHODS["dense_concrete_dropout"].make_mlp(d_model=8, d_hidden=32, dropout=0.1)
    groups = {group["name"]: group for group in parameter_groups(nn.Sequential(mlp), 0.1)}
    assert any(parameter is mlp.dropout.p_logit for parameter in groups["undecayed"]["params"])
    assert groups["undecayed"]["weight_decay"] == 0.0
