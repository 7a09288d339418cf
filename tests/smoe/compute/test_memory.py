"""Peak memory of forward and backward at k = N against that of the dense MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.layer import dense, peak_bytes, step
from smoe import SMoE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d, h, activation", [(64, 128, nn.ReLU), (192, 192, nn.GELU)])
def test_all_experts_take_no_more_than_the_dense_mlp(d, h, activation, dtype):
    layer = SMoE(d, 16 * h, 16, activation=activation.__name__.lower()).to(dtype)
    mlp, x = dense(d, 16 * h, activation).to(dtype), torch.randn(3000, d).to(dtype)
    ours, theirs = (peak_bytes(lambda m=m: step(m, x, torch.ones_like(x), False)) for m in (layer, mlp))
    assert ours <= 1.1 * theirs, ours / theirs
