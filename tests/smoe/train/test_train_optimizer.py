"""Which parameters decay, and that without decay the optimizer is Adam."""

import pytest
import torch
from torch import nn
from toy_task import Toy, toy_config
from transformers import BertConfig, BertForMaskedLM

import smoe
from smoe.train.loop import train
from smoe.train.optimizer import make_optimizer
from smoe.train.processes import Processes


def decays(model: nn.Module) -> dict[str, bool]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, 1e-3, 0.1).param_groups
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(found.values()) <= {0.0, 0.1}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names), "each parameter once"
    return {name: decay == 0.1 for name, decay in found.items()}


def test_biases_and_norms_do_not_decay():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 8),
            "linear": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
            "mlp": smoe.SMoE(8, 32, num_experts=4, router="learned"),
        }
    )
    assert {name for name, decay in decays(model).items() if not decay} == {
        *("linear.bias", "norm.weight", "norm.bias"),
        *(name for name, _ in model.named_parameters() if name.startswith("mlp.") and "bias" in name),
    }
    assert decays(model)["mlp.experts.up"] and decays(model)["mlp.experts.down"] and decays(model)["embedding.weight"]
    assert sum(name.startswith("mlp.experts.") and not decay for name, decay in decays(model).items()) == 2


def test_of_a_hugging_face_model_too():
    sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=16))
    norms = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    for name, decay in decays(model).items():
        assert decay != (name.endswith("bias") or name.startswith(tuple(norms))), name


def test_a_step_with_decay_is_the_formula_of_adamw():
    """theta = theta - lr * (decay * theta + m / (sqrt(v) + eps)), which for the first step is the gradient's sign."""
    model = nn.Linear(2, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 0.01, 0.1)
    model(torch.tensor([[1.0, -1.0]])).sum().backward()
    optimizer.step()
    sign = torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.01 * 0.1) - 0.01 * sign)
    torch.testing.assert_close(model.bias.detach(), before["bias"] - 0.01)


def test_without_decay_it_is_adam():
    torch.manual_seed(0)
    ours, adams = (nn.Linear(4, 4) for _ in range(2))
    adams.load_state_dict(ours.state_dict())
    optimizers = make_optimizer(ours, 0.02), torch.optim.Adam(adams.parameters(), lr=0.02)
    for step in range(5):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, adams), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), adams.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_every_step_has_the_configurations_decay_and_learning_rate(decay, tmp_path, monkeypatch):
    used = []

    def watched(*args):
        optimizer = make_optimizer(*args)
        groups = optimizer.param_groups
        optimizer.register_step_pre_hook(lambda *_: used.append([(g["weight_decay"], g["lr"]) for g in groups]))
        return optimizer

    monkeypatch.setattr("smoe.train.loop.make_optimizer", watched)
    config = toy_config(tmp_path, steps=6, weight_decay=decay, warmup_steps=3)
    train(Toy, config, Processes())
    rates = [config.learning_rate_at(step) for step in range(6)]
    assert used == [[(decay, rate), (0.0, rate)] for rate in rates] and len(set(rates)) == 6
