"""A split measured in the middle of a training leaves no trace."""

from __future__ import annotations

import pytest
import torch
from toy_task import Toy, ToyConfig, toy, toy_config

from smoe import get_top_k, set_top_k
from smoe.train.evaluation import k_name, measure, sweep
from smoe.train.processes import Processes


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("k", [1, 3, None])
def test_mode_k_and_generators_are_left_as_they_were(tmp_path, mode, k):
    task, processes = toy(toy_config(tmp_path, "thor", dropout=0.5))  # its router draws
    task.model.train(mode)
    set_top_k(task.model, [2, 4])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = measure(task, "valid", k, processes)
    assert torch.equal(torch.get_rng_state(), before)
    assert task.model.training is mode and get_top_k(task.model) == [2, 4]
    torch.manual_seed(6)
    assert measure(task, "valid", k, processes) == a, "what is drawn does not depend on the generator's state"
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_they_are_even_when_it_fails(tmp_path):
    class Failing(Toy):
        def passes(self, model, split, device):
            torch.rand(1)
            raise ValueError("broken data")
            yield

    config = toy_config(tmp_path)
    processes = Processes()
    processes.configure(config)
    task = Failing(config, 0, 1)
    set_top_k(task.model.train(), 3)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="broken data"):
        measure(task, "valid", 1, processes)
    assert task.model.training and get_top_k(task.model) == 3 and torch.equal(torch.get_rng_state(), before)


def test_it_measures_in_evaluation_mode_with_k_experts(tmp_path):
    seen = []

    class Spy(Toy):
        def passes(self, model, split, device):
            seen.append((split, model.training, get_top_k(model), torch.is_grad_enabled(), torch.initial_seed()))
            yield torch.tensor([1.0, 2.0, 4.0]).double()
            yield torch.tensor([2.0, 6.0, 4.0]).double()

    config = toy_config(tmp_path)
    processes = Processes()
    processes.configure(config)
    task = Spy(config, 0, 1)
    task.model.train()
    assert measure(task, "test", 3, processes) == ({"accuracy": 3 / 8, "cross_entropy": 1.0}, 8)
    assert seen == [("test", False, 3, False, 0)]


def test_the_sweep_measures_every_split_at_every_k(tmp_path, capsys):
    many = toy_config(tmp_path, num_experts=32, d_hidden=32, sweep=ToyConfig.sweep)
    assert many.sweep_ks() == [1, 2, 4, 8, 12, 16, 32], "N itself, unless another sweep was asked for"
    task, processes = toy(toy_config(tmp_path, sweep=(4, 1, 99)))
    swept = sweep(task, processes)
    assert {split: list(by_k) for split, by_k in swept.items()} == {"valid": ["1", "4"], "test": ["1", "4"]}
    assert swept["test"]["4"] == measure(task, "test", 4, processes)
    assert swept["test"]["1"] != swept["test"]["4"]
    values = [swept[split]["4"].values["accuracy"] for split in ("valid", "test")]
    assert f"k =  4: Accuracy valid {values[0]:.4f}, test {values[1]:.4f}" in capsys.readouterr().out
    dense, processes = toy(toy_config(tmp_path, "dense_dropout"))
    assert list(sweep(dense, processes)["valid"]) == ["dense"] == [k_name(None)]
