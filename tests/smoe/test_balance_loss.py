"""Switch's load-balancing loss over the tokens that count."""

import pytest
import torch

import smoe

D, N, K = 16, 8, 3


def routing_of(x, **options):
    layer = smoe.SMoE(D, 64, N, top_k=K, router="learned", seed=0, **options)
    with torch.no_grad():
        layer.router.weight.mul_(50)  # far from balanced
    with smoe.record_routing(layer) as routings:
        layer(x)
    return layer, routings[0]


def by_hand(layer, x):
    probabilities = torch.softmax(x @ layer.router.weight.t() + layer.router.bias, -1)
    counts = torch.zeros(N)
    for row in probabilities.topk(K).indices.tolist():
        for expert in row:
            counts[expert] += 1
    return N * (counts / counts.sum() * probabilities.mean(0)).sum()


def test_without_a_mask_it_is_that_of_the_routing():
    layer, routing = routing_of(x := torch.randn(50, D))
    assert torch.equal(smoe.balance_loss(routing), routing.balance_loss)
    torch.testing.assert_close(routing.balance_loss, by_hand(layer, x))


@pytest.mark.parametrize("score", ["softmax_after_topk", "softmax_before_topk", "sum"])
def test_padding_does_not_count(score):
    x = torch.randn(4, 6, D)
    mask = torch.arange(6)[None] < torch.tensor([6, 3, 1, 0])[:, None]
    padded = torch.where(mask[..., None], x, 100.0)
    layer, routing = routing_of(padded, score=score)
    for kind in (mask, mask.long(), mask.float().reshape(-1)):
        torch.testing.assert_close(smoe.balance_loss(routing, kind), by_hand(layer, x[mask]))
    assert not torch.allclose(routing.balance_loss, by_hand(layer, x[mask]), rtol=1e-2)


def test_its_gradient_is_that_of_the_tokens_that_count():
    x, mask = torch.randn(20, D), torch.arange(20) < 7
    layer, routing = routing_of(x)
    (masked,) = torch.autograd.grad(smoe.balance_loss(routing, mask), layer.router.weight)
    (alone,) = torch.autograd.grad(by_hand(layer, x[:7]), layer.router.weight)
    torch.testing.assert_close(masked, alone)


def test_nothing_but_padding_and_nothing_at_all():
    layer, routing = routing_of(torch.randn(5, D))
    loss = smoe.balance_loss(routing, torch.zeros(5))
    loss.backward()
    assert loss == 0 and not layer.router.weight.grad.any()
    assert routing_of(torch.randn(0, D))[1].balance_loss == 0


def test_what_has_none_says_so():
    _, routing = routing_of(torch.randn(5, D))
    with pytest.raises(ValueError, match="mask has 4 entries; it must have one for each of the 5 tokens"):
        smoe.balance_loss(routing, torch.ones(4))
    with pytest.raises(ValueError, match="routing has no probabilities; only a learned router's does"):
        smoe.balance_loss(smoe.RandomRouter(D, N, K)(torch.randn(5, D)))
