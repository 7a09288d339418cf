"""The learning rate of every step, against formulas written out here and Hugging Face's schedule."""

import json
import math

import pytest
import torch
import transformers
from toy_task import Toy, toy_config

from smoe.train.learning_rate import learning_rate_at
from smoe.train.loop import train
from smoe.train.processes import Processes


def test_cosine_is_half_a_cosine_times_the_warm_up():
    for step in range(100):
        plain = 0.5 * 0.003 * (1 + math.cos(math.pi * step / 100))
        assert learning_rate_at(step, 100, 0.003, 0, "cosine") == pytest.approx(plain, rel=1e-12)
        warm = plain * [1 / 4, 2 / 4, 3 / 4, 1][min(step, 3)]
        assert learning_rate_at(step, 100, 0.003, 4, "cosine") == pytest.approx(warm, rel=1e-12)
    assert learning_rate_at(0, 100, 0.003, 0, "cosine") == 0.003
    assert learning_rate_at(100, 100, 0.003, 0, "cosine") == 0
    assert learning_rate_at(50, 100, 0.003, 0, "cosine") == pytest.approx(0.0015)


def test_cosine_is_that_of_pytorchs_scheduler():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for step in range(40):
        assert learning_rate_at(step, 40, 2.5e-4, 0, "cosine") == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("steps, warmup", [(20, 0), (20, 1), (20, 7), (20, 20), (20, 30), (1, 0)])
def test_linear_is_that_of_transformers(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=5e-5)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps + 1):
        assert learning_rate_at(step, steps, 5e-5, warmup, "linear") == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_linear_by_hand():
    rates = [learning_rate_at(step, 6, 1.0, 2, "linear") for step in range(7)]
    assert rates == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]


def test_a_training_steps_with_the_rates_of_its_configuration(tmp_path):
    for decay, rates in (("linear", [0, 0.05, 0.1, 0.075, 0.05, 0.025]), ("cosine", [0.05, 0.1 * (2 + 3**0.5) / 4])):
        config = toy_config(tmp_path / decay, decay=decay, steps=6, learning_rate=0.1, warmup_steps=2)
        train(Toy, config, Processes())
        lines = map(json.loads, (tmp_path / decay / "metrics.jsonl").read_text().splitlines())
        logged = [line["train"]["lr"] for line in lines if "train" in line]
        assert logged[: len(rates)] == pytest.approx(rates) and len(logged) == 6
