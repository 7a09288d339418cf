"""What ``summary`` prints."""

import io

import torch
from torch import nn

import smoe
from smoe.modulize import register
from smoe.modulize.summary import count_parameters

D = 16


def mlp(h):
    return nn.Sequential(nn.Linear(D, h), nn.GELU(), nn.Linear(h, D))


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 64), nn.Linear(64, D)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, 64), nn.LayerNorm(64), nn.Linear(64, D)

    def forward(self, x):
        return self.down(self.norm(self.up(x).relu()))


def printed(model):
    file = io.StringIO()
    assert smoe.summary(model, file=file) is None
    return file.getvalue()


def test_what_was_cut_what_was_left_and_why(monkeypatch, capsys):
    monkeypatch.setattr(register, "_registered", {Skipped: None})
    model = nn.ModuleDict({"first": mlp(64), "second": mlp(32), "narrow": mlp(4), "skipped": Skipped()})
    before = printed(model)
    assert "SMoE layers: 0" in before and "  first.2: 16 -> 64 -> 16\n" in before
    smoe.modulize(model, 8, layers=[0], top_k=2, output_scale="num_experts")
    model["normed"] = Normed()
    text = printed(model)
    assert text.splitlines() == [
        f"ModuleDict: {count_parameters(model)[0]:,} parameters, of which a token uses {count_parameters(model)[1]:,}",
        "SMoE layers: 1",
        "  first.2.mlp: 2 of 8 experts, 16 -> 64 -> 16, router random, score softmax_after_topk, "
        "output_scale num_experts",
        "dense MLPs and the like: 4",
        "  second.2: 16 -> 32 -> 16, not chosen",
        "  narrow.2: 16 -> 4 -> 16, narrower than the model",
        "  skipped (Skipped): skipped by register_mlp",
        "  normed (Normed): what reaches its second linear layer is no activation of what left its first",
    ]
    smoe.summary(model)
    assert capsys.readouterr().out == text


def test_parameters_are_those_that_a_token_uses():
    layer = smoe.SMoE(D, 64, 8, top_k=3, router="learned")
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(D, D)})
    one_expert = 2 * D * 8 + 8 + D
    rest = 8 * D + 8 + D * D + D
    assert count_parameters(model) == (8 * one_expert + rest, 3 * one_expert + rest)
    assert count_parameters(model)[0] == sum(p.numel() for p in model.parameters())
    smoe.set_top_k(model, 8)
    assert len(set(count_parameters(model))) == 1


def test_nothing_of_the_model_changes():
    model = smoe.modulize(nn.Sequential(mlp(64), nn.Dropout(0.1), mlp(64)), 4, layers=[0]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    printed(model)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
