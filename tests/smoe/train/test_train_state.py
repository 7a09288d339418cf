"""The state of optimizer and generators survives the trip through safetensors bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smoe.train.checkpoint import save_checkpoint
from smoe.train.resume import load_latest, restore_optimizer, restore_rng
from smoe.train.state import optimizer_tensors, rng_tensors

OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1 / 3, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95)),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "tensor_lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
}


def build(kind: str, seed: int, flipped: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 3))
    model[3].requires_grad_(False)
    decay = [model[0].weight, model[2].weight, model[3].weight]  # the last never gets state
    groups = [{"params": decay[::-1] if flipped else decay, "weight_decay": 0.1}]
    return model, OPTIMIZERS[kind]([*groups, {"params": [model[0].bias, model[2].bias]}])


def train(model, optimizer, steps: range) -> None:
    """Each step has its own learning rate, as the loop sets it."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0 + 0.01 / (step + 3)
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def options(optimizer) -> list[dict]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def assert_equal_parameters(model, other) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("flipped", [False, True])  # the order of parameters inside a group does not matter
def test_resumed_training_equals_uninterrupted_training(tmp_path, kind, flipped):
    model, optimizer = build(kind, 0)
    train(model, optimizer, range(5))
    groups = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)}
    save_checkpoint(tmp_path, 5, groups, {})
    train(model, optimizer, range(5, 10))

    again, fresh = build(kind, 1, flipped)
    before = options(fresh)
    loaded = load_latest(tmp_path)
    again.load_state_dict(loaded.tensors["model"])
    restore_optimizer(fresh, loaded.tensors["optimizer"], again)
    assert options(fresh) == before  # they follow from the configuration
    train(again, fresh, range(5, 10))
    assert_equal_parameters(model, again)
    flat, flat_again = optimizer_tensors(optimizer, model), optimizer_tensors(fresh, again)
    assert flat.keys() == flat_again.keys() and all(flat[key].equal(flat_again[key]) for key in flat)
    assert (flat == {}) == (kind == "sgd")


def test_before_the_first_step_there_is_nothing():
    model, optimizer = build("adam", 0)
    assert optimizer_tensors(optimizer, model) == {}
    restore_optimizer(optimizer, {}, model)
    train(model, optimizer, range(1))


def test_restored_tensors_are_the_optimizers_own():
    model, optimizer = build("adam", 0)
    train(model, optimizer, range(2))
    tensors = {key: value.clone() for key, value in optimizer_tensors(optimizer, model).items()}
    before = {key: value.clone() for key, value in tensors.items()}
    restore_optimizer(optimizer, tensors, model)
    train(model, optimizer, range(2))
    assert all(tensors[key].equal(before[key]) for key in tensors)
    assert not optimizer.state[model[0].weight]["exp_avg"].equal(before["state/0.weight/exp_avg"])


def test_a_state_wider_than_its_parameter_keeps_its_dtype():
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    wide = torch.full((3, 3), 1 / 3)
    optimizer.state[model.weight]["exp_avg"] = wide
    other = torch.optim.Adam(model.parameters())
    restore_optimizer(other, optimizer_tensors(optimizer, model), model)
    assert other.state[model.weight]["exp_avg"].equal(wide)
    assert other.state[model.bias]["exp_avg"].dtype == torch.bfloat16


def test_another_model_is_refused_and_nothing_changes():
    model, optimizer = build("adam", 0)
    train(model, optimizer, range(2))
    tensors = optimizer_tensors(optimizer, model)
    other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    fresh = torch.optim.Adam(other.parameters())
    with pytest.raises(ValueError, match=r"optimizer: parameter '2\.bias' is only in the checkpoint"):
        restore_optimizer(fresh, tensors, other)
    assert not fresh.state


def test_a_parameter_that_has_never_had_a_gradient_does_not_hinder(tmp_path):
    """Such as what a task's loss does not use of a model."""
    model, optimizer = build("adam", 0)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    optimizer.add_param_group({"params": [model.unused]})
    train(model, optimizer, range(2))
    tensors = optimizer_tensors(optimizer, model)
    assert not any("unused" in key for key in tensors)
    restore_optimizer(optimizer, tensors, model)
    model.unused.sum().backward()
    optimizer.step()
    assert optimizer.state[model.unused]["step"] == 1 and optimizer.state[model[0].weight]["step"] == 3


@pytest.mark.parametrize("kind", ["adam", "tensor_lr"])
def test_parameters_may_be_grouped_in_another_way(kind):
    """As where they are grouped by how they are spread over processes."""
    model, optimizer = build(kind, 0)
    train(model, optimizer, range(2))
    again, _ = build(kind, 0)
    again.load_state_dict(model.state_dict())
    parts = [[again[0].weight], [again[0].bias], [again[2].weight, again[3].weight], [again[2].bias]]
    groups = [{"params": part, "weight_decay": d} for part, d in zip(parts, (0.1, 0, 0.1, 0), strict=True)]
    fresh = OPTIMIZERS[kind](groups)
    restore_optimizer(fresh, optimizer_tensors(optimizer, model), again)
    train(model, optimizer, range(2, 4))
    train(again, fresh, range(2, 4))
    assert_equal_parameters(model, again)


def test_a_group_may_be_empty():
    """Where nothing is without weight decay, say."""
    layer = nn.Linear(2, 2, bias=False)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": []}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    restore_optimizer(optimizer, optimizer_tensors(optimizer, layer), layer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    assert optimizer.state[layer.weight]["step"] == 1


def draw() -> list:
    dropped = nn.functional.dropout(torch.ones(8)).tolist()
    return [torch.rand(2).tolist(), torch.randn(1).tolist(), torch.randperm(9).tolist(), dropped]


@pytest.mark.parametrize("half_drawn", [False, True])  # a gaussian kept for the next call is part of the state
def test_generators_continue_where_they_were(tmp_path, half_drawn):
    torch.manual_seed(3)
    if half_drawn:
        torch.randn(1)
    save_checkpoint(tmp_path, 1, {"rng-rank0": rng_tensors()}, {})
    expected = draw()
    assert draw() != expected
    restore_rng(load_latest(tmp_path).tensors["rng-rank0"])
    assert draw() == expected


def test_a_cuda_generator_is_passed_over_where_there_is_no_cuda(monkeypatch):
    state = {**rng_tensors(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    expected = draw()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda _: pytest.fail("there is no CUDA device"))
    restore_rng(state)
    assert draw() == expected
