"""The attention of BERT and RoBERTa: products and the fused kernel compute the same, and each is used where it pays."""

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
    """The calls that went to the fused kernel."""
    calls, kernel = [], attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    return calls


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
    out, weights = attention.attend(nn.Module(), *inputs, there if masked else None, scaling=D_HEAD**-0.5)
    naive = [x.detach().double().requires_grad_() for x in inputs]
    expected = per_query(*naive, LENGTHS if masked else [T] * B)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)
    assert out.dtype == torch.bfloat16 and weights is None and not fused
    ways = torch.randn(B, T, H, D_HEAD)
    (out.float() * ways).sum().backward()
    (expected * ways).sum().backward()
    for ours, theirs in zip(inputs, naive, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=5e-2)


def test_float32_and_long_sequences_use_the_fused_kernel(inputs, fused, monkeypatch):
    module = nn.Module()
    module.is_causal = False
    short = attention.attend(module, *inputs, None, scaling=D_HEAD**-0.5)[0]
    attention.attend(module, *(x.float() for x in inputs), None, scaling=D_HEAD**-0.5)
    assert len(fused) == 1
    monkeypatch.setattr(attention, "LONGEST", T - 1)
    long = attention.attend(module, *inputs, None, scaling=D_HEAD**-0.5)[0]
    assert len(fused) == 2
    torch.testing.assert_close(short, long, rtol=0, atol=3e-2)


def test_dropout_is_on_the_weights_and_keeps_their_expectation(inputs):
    query, key, _ = inputs
    ones = torch.ones_like(query)
    torch.manual_seed(1)
    drawn = [attention.attend(nn.Module(), query, key, ones, None, dropout=0.5)[0] for _ in range(200)]
    assert drawn[0].std() > 0.1  # without dropout a mean of ones is 1
    assert abs(torch.stack(drawn).float().mean() - 1) < 0.03


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_a_model_in_bfloat16_uses_products_and_ignores_padding(model, fused):
    config = PretrainConfig(
        "dense_dropout", "unused", model=model, num_layers=2, d_model=32, num_heads=4, d_hidden=64, seq_len=16
    )
    encoder = build_model(config, Vocabulary(size=100, pad=1, unknown=3, start=0, end=2, mask=4)).base_model.eval()
    ids = torch.randint(5, 100, (2, 12))
    ids[1, 7:] = 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        padded, alone = encode(encoder, ids), encode(encoder, ids[1:, :7])
    assert not fused
    torch.testing.assert_close(padded[1:, :7], alone, rtol=0, atol=3e-2)
    with torch.no_grad():
        whole = encode(encoder, ids)
    assert len(fused) == 2  # one per layer
    torch.testing.assert_close(padded.float()[0], whole[0], rtol=0, atol=6e-2)
