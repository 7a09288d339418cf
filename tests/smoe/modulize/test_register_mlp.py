"""``register_mlp``: an MLP that ``modulize`` doesn't know by itself, named by hand."""

import pytest
import torch
from torch import nn

import smoe

D, H = 16, 64


class Odd(nn.Module):
    """An MLP that gives nothing away: it can't be called with a tensor alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.rate = nn.Linear(D, H), nn.Linear(H, D), 0.0

    def forward(self, *, batch):
        return self.second(torch.sin(self.first(batch["x"])))


def test_register_mlp(registry):
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(3, D)
    y = model(batch={"x": x})
    with pytest.raises(ValueError, match="Odd"):
        smoe.modulize(model, 4)
    smoe.register_mlp(Odd, up="first", down="second", activation=torch.sin, dropout="rate")
    smoe.modulize(model, 4, score="sum")
    torch.testing.assert_close(model(batch={"x": x}), y, atol=1e-5, rtol=1e-5)
    smoe.demodulize(model)
    assert torch.equal(model(batch={"x": x}), y)


def test_register_mlp_to_skip(registry):
    model = nn.ModuleDict({"good": nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)), "bad": Odd()})
    with pytest.raises(ValueError, match="Odd"):
        smoe.modulize(model, 4)
    smoe.register_mlp(Odd, skip=True)
    assert [name for name, _ in smoe.smoe_layers(smoe.modulize(model, 4))] == ["good.2.mlp"]


def test_register_mlp_with_a_wrong_form(registry):
    with pytest.raises(ValueError, match="up is None"):
        smoe.register_mlp(Odd)
    smoe.register_mlp(Odd, up="first", down="third")
    with pytest.raises(ValueError, match="down='third', but there is no such layer"):
        smoe.modulize(Odd(), 4)
