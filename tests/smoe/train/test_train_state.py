"""Optimizer and generator states survive the trip through safetensors and JSON bit for bit."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch
from torch import nn

from smoe.run.checkpoint import load_latest, save_checkpoint
from smoe.run.state import flatten_optimizer, restore_optimizer, restore_rng, rng_tensors

OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1 / 3, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95)),
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


def train(model, optimizer, schedule, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def cosine(kind, optimizer):
    return None if kind == "tensor_lr" else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("flipped", [False, True])  # the order of parameters inside a group does not matter
def test_resumed_training_equals_uninterrupted_training(tmp_path, kind, flipped):
    model, optimizer = build(kind, 0)
    schedule = cosine(kind, optimizer)
    train(model, optimizer, schedule, range(5))
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    kept = {"optimizer": state, "schedule": schedule.state_dict() if schedule else None}
    save_checkpoint(tmp_path, 5, {"model": model.state_dict(), "optimizer": tensors}, kept)
    saved_options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    saved_options = json.loads(json.dumps(saved_options, default=float))
    train(model, optimizer, schedule, range(5, 10))

    again, fresh = build(kind, 1, flipped)
    schedule = cosine(kind, fresh)
    loaded = load_latest(tmp_path)
    again.load_state_dict(loaded.tensors["model"])
    restore_optimizer(fresh, loaded.tensors["optimizer"], loaded.state["optimizer"], again.named_parameters())
    if schedule is not None:
        schedule.load_state_dict(loaded.state["schedule"])
    restored = [{k: v for k, v in group.items() if k != "params"} for group in fresh.param_groups]
    assert json.loads(json.dumps(restored, default=float)) == saved_options  # learning rates exact to the last bit
    assert all(isinstance(group.get("betas", ()), tuple) for group in fresh.param_groups)
    train(again, fresh, schedule, range(5, 10))
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.equal(b), name
    flat, flat_again = (flatten_optimizer(o, m.named_parameters())[0] for o, m in ((optimizer, model), (fresh, again)))
    assert flat.keys() == flat_again.keys() and all(flat[key].equal(flat_again[key]) for key in flat)


def test_restored_tensors_are_the_optimizers_own():
    model, optimizer = build("adam", 0)
    train(model, optimizer, None, range(2))
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    tensors = {key: value.clone() for key, value in tensors.items()}
    before = {key: value.clone() for key, value in tensors.items()}
    restore_optimizer(optimizer, tensors, state, model.named_parameters())
    train(model, optimizer, None, range(2))
    assert all(tensors[key].equal(before[key]) for key in tensors)


def test_a_state_wider_than_its_parameter_keeps_its_dtype():
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    wide = torch.full((3, 3), 1 / 3)
    optimizer.state[model.weight]["exp_avg"] = wide
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    other = torch.optim.Adam(model.parameters())
    restore_optimizer(other, tensors, state, model.named_parameters())
    assert other.state[model.weight]["exp_avg"].equal(wide)
    assert other.state[model.bias]["exp_avg"].dtype == torch.bfloat16


def test_another_model_is_refused_and_nothing_changes():
    model, optimizer = build("adam", 0)
    train(model, optimizer, None, range(2))
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    fresh = torch.optim.Adam(
        [{"params": [p for n, p in other.named_parameters() if n.endswith(e)]} for e in ("t", "s")]
    )
    with pytest.raises(ValueError, match=r"parameter '1\.bias' is only in the model"):
        restore_optimizer(fresh, tensors, state, other.named_parameters())
    assert not fresh.state
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1 for '0\.weight' in the checkpoint, and 0"):
        one = torch.optim.Adam([p for name, p in model.named_parameters() if name != "3.bias"])
        restore_optimizer(one, tensors, state, model.named_parameters())
    with pytest.raises(ValueError, match="has no name"):
        flatten_optimizer(optimizer, list(model.named_parameters())[:1])


@pytest.mark.parametrize("kind", ["adam", "tensor_lr"])
def test_parameters_may_be_grouped_in_another_way(kind):
    """As where they are grouped by how they are spread over processes."""
    model, optimizer = build(kind, 0)
    train(model, optimizer, None, range(2))
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    again, _ = build(kind, 0)
    again.load_state_dict(model.state_dict())
    parts = [[again[0].weight], [again[0].bias], [again[2].weight, again[3].weight], [again[2].bias]]
    fresh = OPTIMIZERS[kind]([{"params": part} for part in parts])
    restore_optimizer(fresh, tensors, state, again.named_parameters())
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.1, 0, 0.1, 0]
    train(model, optimizer, None, range(2, 4))
    train(again, fresh, None, range(2, 4))
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.equal(b), name


def draw() -> list:
    values = [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.standard_normal()]
    return [
        *values,
        torch.rand(2).tolist(),
        torch.randperm(9).tolist(),
        torch.nn.functional.dropout(torch.ones(8)).tolist(),
    ]


def test_a_group_may_be_empty():
    """Where nothing is without weight decay, say."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": list(layer.parameters())}, {"params": [], "weight_decay": 0.0}])
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors, plain = flatten_optimizer(optimizer, layer.named_parameters())
    restore_optimizer(optimizer, tensors, plain, layer.named_parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]


@pytest.mark.parametrize("half_drawn", [False, True])  # a gaussian kept for the next call is part of the state
def test_generators_continue_where_they_were(tmp_path, half_drawn):
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    if half_drawn:
        draw()
    save_checkpoint(tmp_path, 1, {"rng-rank0": rng_tensors()}, {})
    expected = draw()
    assert draw() != expected
    restore_rng(load_latest(tmp_path).tensors["rng-rank0"])
    assert draw() == expected
