"""Cutting a dense MLP into experts and merging them back gives the same bits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smoe import Experts, merge, split
from smoe.experts import check_divisible, split_output_bias


def dense_weights(
    d: int, hidden: int, *, gated=False, bias=True, dtype=torch.float32, seed=0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up_weight": (hidden, d), "down_weight": (d, hidden)}
    if gated:
        shapes["gate_weight"] = (hidden, d)
    if bias:
        shapes |= {"up_bias": (hidden,), "down_bias": (d,)}
        if gated:
            shapes["gate_bias"] = (hidden,)
    # numbers of very different sizes, so that a rounding error in the shares of a bias shows
    return {
        name: (torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 4, shape, generator=generator)).to(
            dtype
        )
        for name, shape in shapes.items()
    }


@settings(deadline=None, max_examples=60)
@given(
    num_experts=st.integers(1, 70),
    d_expert=st.integers(1, 4),
    d=st.integers(1, 9),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_split_then_merge_gives_back_every_bit(num_experts, d_expert, d, gated, bias, dtype, seed):
    dense = dense_weights(d, num_experts * d_expert, gated=gated, bias=bias, dtype=dtype, seed=seed)
    experts = Experts(num_experts, d, d_expert, gated=gated, bias=bias).to(dtype)
    split(experts, dense)
    merged = merge(experts)
    assert merged.keys() == dense.keys()
    for name, value in dense.items():
        assert merged[name].dtype == dtype and torch.equal(merged[name], value), name
        assert merged[name].is_contiguous()


@settings(deadline=None, max_examples=60)
@given(
    num_experts=st.integers(1, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_shares_of_a_bias_add_up_to_it(num_experts, dtype, seed):
    bias = dense_weights(64, 1, dtype=dtype, seed=seed)["down_bias"]
    shares = split_output_bias(bias, num_experts)
    assert torch.equal(shares.double().sum(0).to(dtype), bias)
    even = bias.double() / num_experts
    # all shares are about equal: the last one takes only the rounding errors of the others
    slack = even.abs() * (0.51 * num_experts + 1) * torch.finfo(dtype).eps
    assert ((shares.double() - even).abs() <= slack).all()


def test_float64_is_exact_but_for_the_last_bit():
    bias = torch.randn(100, dtype=torch.float64)
    torch.testing.assert_close(split_output_bias(bias, 7).sum(0), bias, rtol=1e-15, atol=0)


def test_bias_is_split_in_the_dtype_of_the_experts():
    dense = dense_weights(8, 12)
    experts = Experts(3, 8, 4).bfloat16()
    split(experts, dense)
    for name, value in merge(experts).items():
        assert torch.equal(value, dense[name].bfloat16()), name


def test_expert_e_holds_its_own_hidden_units():
    dense = dense_weights(5, 12)
    experts = Experts(4, 5, 3)
    split(experts, dense)
    for e in range(4):
        units = slice(3 * e, 3 * e + 3)
        assert torch.equal(experts.up[e], dense["up_weight"][units])
        assert torch.equal(experts.up_bias[e], dense["up_bias"][units])
        assert torch.equal(experts.down[e], dense["down_weight"][:, units].t())


@pytest.mark.parametrize(("num_experts", "d", "d_expert"), [(1, 1, 4), (1, 3, 1), (2, 1, 1), (3, 4, 2)])
def test_merge_gives_new_tensors(num_experts, d, d_expert):
    experts = Experts(num_experts, d, d_expert, gated=True)
    before = copy.deepcopy(experts.state_dict())
    for value in merge(experts).values():
        value.add_(1)
    for name, value in experts.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_missing_biases_become_zero():
    for absent in ({}, {"up_bias": None, "down_bias": None}):
        experts = Experts(2, 4, 3)
        split(experts, {**dense_weights(4, 6, bias=False), **absent})
        assert (experts.up_bias == 0).all() and (experts.down_bias == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # a GPT-2 style (in, out) matrix has the right number of elements, but reshaping it would scramble it
        ({"up_weight": torch.ones(4, 6)}, ["up_weight", "(4, 6)", "(6, 4)"]),
        ({"down_weight": torch.ones(6, 4)}, ["down_weight", "(6, 4)", "(4, 6)"]),
        ({"down_bias": torch.ones(6)}, ["down_bias", "(6,)", "(4,)"]),
        ({"down_weight": None}, ["down_weight"]),
        ({"gate_weight": torch.ones(6, 4)}, ["gate_weight"]),
        ({"up_biass": torch.ones(6)}, ["up_biass"]),
    ],
)
def test_split_refuses_what_does_not_fit_and_changes_nothing(change, words):
    experts = Experts(2, 4, 3)
    before = copy.deepcopy(experts.state_dict())
    with pytest.raises(ValueError) as error:
        split(experts, {**dense_weights(4, 6), **change})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())


def test_split_does_not_drop_a_bias_silently():
    with pytest.raises(ValueError, match="up_bias"):
        split(Experts(2, 4, 3, bias=False), dense_weights(4, 6))


def test_starts_like_the_dense_mlp():
    d, hidden, n = 64, 1600, 5
    up, down = nn.Linear(d, hidden), nn.Linear(hidden, d)
    merged = merge(Experts(n, d, hidden // n))
    for name, linear in (("up", up), ("down", down)):
        for kind in ("weight", "bias"):
            got, wanted = merged[f"{name}_{kind}"], getattr(linear, kind)
            bound = linear.in_features**-0.5
            assert got.abs().max() <= bound * 1.0001 and got.abs().max() > 0.9 * bound
            torch.testing.assert_close(got.std(), wanted.detach().std(), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("sizes", "field"), [((0, 4, 2), "num_experts"), ((2, 0, 2), "d_model"), ((2, 4, 0), "d_expert")]
)
def test_bad_sizes_are_named(sizes, field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        Experts(*sizes)


def test_divisible():
    assert check_divisible(8192, 16) == 512
    with pytest.raises(ValueError, match="d_hidden is 100, .* num_experts = 16 .* 96 and 112 fit"):
        check_divisible(100, 16)
    with pytest.raises(ValueError, match="d_hidden is 8, .* smallest that fits is 16"):
        check_divisible(8, 16)
