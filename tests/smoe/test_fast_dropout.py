"""The fast dropout: rate, scale, gradients, seeds."""

import pytest
import torch

from smoe.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_rate_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 333, dtype=dtype)
    y = Dropout(p)(x)
    assert y.dtype == dtype and y.shape == x.shape
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=0.01, atol=0)
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((y == 0).double().mean().item() - p) < 4 * deviation
    # Four neighbours come from one draw and must be independent nevertheless.
    dropped = (y == 0).double().flatten()
    for k in (1, 2, 3):
        assert abs((dropped[:-k] * dropped[k:]).mean().item() - p * p) < 6 * deviation


def test_gradient_has_the_same_mask() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / x.detach())
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_seeded_and_off_when_evaluating() -> None:
    x = torch.randn(5, 7)
    dropout = Dropout(0.5)
    torch.manual_seed(1)
    first = dropout(x)
    second = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    assert dropout.eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)
