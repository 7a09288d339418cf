"""Experts whose parameters have several dtypes compute in the dtype of x, on every path."""

import pytest
import torch

import smoe
from smoe.compute import PATHS

D, H, N = 8, 32, 4


@pytest.mark.parametrize("compute", sorted(PATHS))
@pytest.mark.parametrize("gated", [False, True])
def test_output_and_gradients_are_those_of_x_dtype(compute, gated):
    torch.manual_seed(0)
    mixed = smoe.SMoE(D, H, N, 2, seed=0, gated=gated, activation="gelu", compute=compute)
    mixed.experts.up.data = mixed.experts.up.data.half()
    mixed.experts.down_bias.data = mixed.experts.down_bias.data.bfloat16()
    whole = smoe.SMoE(D, H, N, 2, seed=0, gated=gated, activation="gelu", compute="reference")
    whole.load_state_dict(mixed.state_dict())
    x = torch.randn(9, D)
    y = mixed(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, whole(x))
    y.square().sum().backward()
    whole(x).square().sum().backward()
    for (name, a), b in zip(mixed.experts.named_parameters(), whole.experts.parameters(), strict=True):
        assert a.grad.dtype == a.dtype, name
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2e-2, atol=2e-2)
