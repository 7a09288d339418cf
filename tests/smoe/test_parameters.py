"""Which parameters go into which group of an optimizer."""

import pytest
import torch
from tiny_models import inputs_of, logits_of, tiny
from torch import nn

import smoe

D, H, N = 16, 64, 4


def by_name(model, weight_decay=0.1):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = smoe.parameter_groups(model, weight_decay)
    return {group["name"]: {names[p] for p in group["params"]} for group in groups}


def test_every_kind_in_its_group():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, D), nn.Linear(D, 9, bias=False)
            self.head.weight = self.embed.weight  # tied
            self.norm, self.linear, self.conv = nn.LayerNorm((3, D)), nn.Linear(D, D), nn.Conv1d(D, D, 3)
            self.gain = nn.Parameter(torch.ones(()))
            self.mlp = smoe.SMoE(D, H, N, router="learned", gated=True)
            self.fixed = nn.Linear(D, D).requires_grad_(False)

    assert by_name(Model()) == {
        "matrices": {"linear.weight"},
        "experts": {"mlp.experts.up", "mlp.experts.gate", "mlp.experts.down"},
        "others": {"embed.weight", "conv.weight"},
        "undecayed": {"norm.weight", "norm.bias", "linear.bias", "conv.bias", "gain"}
        | {f"mlp.experts.{name}_bias" for name in ("up", "gate", "down")}
        | {"mlp.router.weight", "mlp.router.bias"},
    }
    decay = {group["name"]: group["weight_decay"] for group in smoe.parameter_groups(Model(), 0.1)}
    assert decay == {"matrices": 0.1, "experts": 0.1, "others": 0.1, "undecayed": 0.0}


@pytest.mark.parametrize("name", ["BERT", "T5", "ViT", "Llama"])
def test_the_parameters_of_a_model_are_all_there_once(name):
    model = smoe.modulize(tiny(name), N, top_k=2)
    groups = smoe.parameter_groups(model, 0.1)
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))
    undecayed = by_name(model)["undecayed"]
    assert not any(n.endswith("weight") and "norm" not in n.lower() for n in undecayed)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    logits_of(model, **inputs_of(model)).square().mean().backward()
    optimizer.step()


def test_decay_shrinks_the_experts_and_not_their_biases():
    layer = smoe.SMoE(D, H, N)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.AdamW(smoe.parameter_groups(layer, 0.5), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in layer.named_parameters():
        factor = 1.0 if name.endswith("bias") else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter, before[name] * factor)


def test_muon_takes_the_matrices():
    model = smoe.modulize(nn.Sequential(nn.Linear(D, D), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)), N)
    groups = {group["name"]: group for group in smoe.parameter_groups(model, 0.1)}
    torch.optim.Muon(groups["matrices"]["params"])
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(groups["experts"]["params"])
    assert all(parameter.shape == (N, H // N, D) for parameter in groups["experts"]["params"])


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf"), "much", True, None])
def test_a_decay_that_is_none(weight_decay):
    with pytest.raises(ValueError, match="weight_decay is .*; it must be a number of at least 0"):
        smoe.parameter_groups(nn.Linear(2, 2), weight_decay)
