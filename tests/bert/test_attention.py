"""The attention of BERT and RoBERTa: products and PyTorch's kernel compute the same; which is used when."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from bert import attention
from bert.config import PretrainConfig
from bert.data import Vocabulary
from bert.finetune import encode
from bert.model import build_model

B, H, T, D_HEAD = 3, 2, 10, 8
LENGTHS = (10, 7, 1)  # the tokens of each row that are no padding


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [torch.randn(B, H, T, D_HEAD, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


@pytest.fixture
def fused(monkeypatch):
    """The calls that went to PyTorch's kernel."""
    calls, kernel = [], attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    return calls


def layer(is_causal=False):
    """What Transformers gives as the module that attends."""
    module = nn.Module()
    module.is_causal = is_causal
    return module


def per_query(q, k, v, lengths):
    """(B, T, H, d_head), one query after another."""
    rows = []
    for b, length in enumerate(lengths):
        for t in range(T):
            for h in range(H):
                weights = (k[b, h, :length] @ q[b, h, t] / math.sqrt(D_HEAD)).softmax(0)
                rows.append(weights @ v[b, h, :length])
    return torch.stack(rows).view(B, T, H, D_HEAD)


@pytest.mark.parametrize("masked", [False, True])
def test_products_and_their_gradients_are_those_of_a_loop_over_queries(inputs, fused, masked):
    there = (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1))[:, None, None, :]
    out, weights = attention.attend(layer(), *inputs, there if masked else None, scaling=D_HEAD**-0.5)
    naive = [x.detach().double().requires_grad_() for x in inputs]
    expected = per_query(*naive, LENGTHS if masked else [T] * B)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)
    assert out.dtype == torch.bfloat16 and weights is None and not fused
    ways = torch.randn(B, T, H, D_HEAD)
    (out.float() * ways).sum().backward()
    (expected * ways).sum().backward()
    for ours, theirs in zip(inputs, naive, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=5e-2)


def test_float32_and_long_sequences_use_the_kernel_of_pytorch(inputs, fused, monkeypatch):
    short = attention.attend(layer(), *inputs, None, scaling=D_HEAD**-0.5)[0]
    attention.attend(layer(), *(x.float() for x in inputs), None, scaling=D_HEAD**-0.5)
    assert len(fused) == 1
    monkeypatch.setattr(attention, "LONGEST", T - 1)
    long = attention.attend(layer(), *inputs, None, scaling=D_HEAD**-0.5)[0]
    assert len(fused) == 2
    torch.testing.assert_close(short, long, rtol=0, atol=3e-2)


def test_without_gradients_the_kernel_of_pytorch_is_used(inputs, fused):
    with_gradients = attention.attend(layer(), *inputs, None)[0]
    assert not fused
    with torch.no_grad():
        torch.testing.assert_close(attention.attend(layer(), *inputs, None)[0], with_gradients, rtol=0, atol=3e-2)
    assert len(fused) == 1


def test_what_products_do_not_know_goes_to_the_kernel_of_pytorch(inputs, fused):
    there = torch.ones(T, T, dtype=torch.bool).tril()
    causal = attention.attend(layer(is_causal=True), *inputs, None)[0]
    assert len(fused) == 1
    torch.testing.assert_close(causal, attention.attend(layer(), *inputs, there[None, None])[0], rtol=0, atol=3e-2)
    assert len(fused) == 1
    numbers = torch.zeros(T, T, dtype=torch.bfloat16).masked_fill(~there, -torch.inf)
    torch.testing.assert_close(attention.attend(layer(), *inputs, numbers)[0], causal, rtol=0, atol=3e-2)
    assert len(fused) == 2
    attention.attend(layer(), *inputs, None, position_bias=torch.zeros(1, H, T, T, dtype=torch.bfloat16))
    assert len(fused) == 3


def test_dropout_is_on_the_weights_and_keeps_their_expectation(inputs):
    query, key, _ = inputs
    ones = torch.ones_like(query)
    torch.manual_seed(1)
    drawn = [attention.attend(layer(), query, key, ones, None, dropout=0.5)[0] for _ in range(200)]
    assert drawn[0].std() > 0.1  # without dropout a mean of ones is 1
    assert (drawn[0] == drawn[0][..., :1]).all()  # one weight for all of a value, so not on the output
    assert abs(torch.stack(drawn).float().mean() - 1) < 0.03


@pytest.fixture(params=["bert", "roberta"])
def encoder(request):
    """A small encoder without dropout whose attention matters: its weights are large."""
    config = PretrainConfig("dense_dropout", "unused", model=request.param, num_layers=2, d_model=32, num_heads=4)
    config = dataclasses.replace(config, d_hidden=64, seq_len=16, init_std=0.3, dropout=0.0, attention_dropout=0.0)
    torch.manual_seed(0)
    return build_model(config, Vocabulary(size=100, pad=1, unknown=3, start=0, end=2, mask=4)).base_model


@pytest.fixture
def ids():
    """(2, 12), the last five of the second row are padding."""
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[1, 7:] = 1
    return ids


def test_a_model_in_bfloat16_uses_products_and_ignores_padding(encoder, ids, fused):
    with torch.autocast("cpu", torch.bfloat16):
        padded, alone = encode(encoder, ids)[1, :7], encode(encoder, ids[1:, :7])[0]
        seen = encode(encoder, ids.where(ids != 1, 5))[1, :7]
    assert not fused
    apart = (padded - alone).abs().mean()
    assert apart < 0.02 and (seen - alone).abs().mean() > 10 * apart


def test_a_model_in_bfloat16_has_the_gradients_of_one_in_float32(encoder, ids, fused):
    ways = torch.randn(2, 12, 32)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = encode(encoder, ids)
        (hidden.float() * ways).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    assert len(fused) == 2  # one per layer, in float32 alone
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and sum(".query.weight" in name for name in ours) == 2
    for name, gradient in theirs.items():
        if ".key.bias" in name:  # adds the same to all scores of a query: its gradient is 0
            continue
        assert (ours[name] - gradient).norm() < 0.1 * gradient.norm(), name
