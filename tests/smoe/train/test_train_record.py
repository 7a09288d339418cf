"""What a result says of the model's size, of the work done, and of how the run departs from its method."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from torch import nn
from toy_task import toy, toy_config

import smoe
from smoe.report import check_result
from smoe.train.evaluation import Measured, sweep
from smoe.train.record import flops_at_k, label, make_record, parameter_counts, training_flops


def model() -> nn.Sequential:
    layers = [smoe.SMoE(8, 32, num_experts=4, seed=0), smoe.SMoE(8, 16, num_experts=2, seed=0)]
    return nn.Sequential(nn.Linear(8, 8), *layers)


def test_parameters_are_split_into_experts_and_the_rest():
    net = model()
    experts = sum(p.numel() for layer in net[1:] for p in layer.experts.parameters())
    rest = 8 * 8 + 8
    assert parameter_counts(net) == {
        "total": experts + rest,
        "trainable": experts + rest,
        "experts": experts,
        "rest": rest,
        "active_per_k": {},
    }
    net[0].requires_grad_(False)
    assert parameter_counts(net)["trainable"] == experts
    net.append(net[0])  # a shared layer counts once
    assert parameter_counts(net)["total"] == experts + rest


def test_active_parameters_grow_by_one_expert_of_each_layer_until_it_has_no_more():
    net = model()
    counts = parameter_counts(net, [1, 2, 4])
    one = [sum(p.numel() for p in layer.experts.parameters()) // layer.num_experts for layer in net[1:]]
    assert counts["active_per_k"] == {
        "1": counts["rest"] + one[0] + one[1],
        "2": counts["rest"] + 2 * one[0] + 2 * one[1],
        "4": counts["total"],  # the second layer has only two
    }
    assert parameter_counts(nn.Linear(2, 3), [1, 8])["active_per_k"] == {"1": 9, "8": 9}


SCHEDULES = [
    {},  # linear from 2 to 4
    {"schedule": "random", "k_min": 1},
    {"schedule": "random_per_layer", "k_min": 1},
    {"schedule": "linear", "k_min": 1, "layers": "later"},
    {"schedule": "random_per_layer", "k_min": 1, "layers": (0, 2), "num_layers": 3},
    {"method": "smoe", "schedule": "multistep", "k_min": 1, "k_max": 4},
    {"method": "thor"},
    {"method": "thor", "consistency_weight": 0.0},
    {"num_experts": 1, "sweep": (1,)},
    {"method": "dense_dropout"},
]


@pytest.mark.parametrize("fields", SCHEDULES)
def test_training_flops_are_those_of_all_steps(fields, tmp_path):
    config = toy_config(tmp_path, **fields)
    task, _ = toy(config)
    with torch.device("meta"):
        meta = task.build_model()
    each = [task.flops(meta, config.ks_at(step) or None)["training_step"] for step in range(config.steps)]
    flops = flops_at_k(task, meta)
    assert training_flops(config, flops, config.steps) == sum(each) > 0
    assert training_flops(config, flops, 5) == sum(each[:5])
    if config.schedule in ("random", "random_per_layer"):
        assert statistics.pstdev(each) > 0


@pytest.mark.parametrize("fields", [{}, {"layers": "later"}, {"method": "smoe"}, {"method": "thor"}])
def test_flops_at_any_k_are_what_a_count_at_that_k_gives(fields, tmp_path):
    task, _ = toy(toy_config(tmp_path, **fields))
    flops, layers = flops_at_k(task, task.model), len(task.config.smoe_layers())
    counted = [task.flops(task.model, k) for k in range(1, 5)]
    assert [flops(k * layers) for k in range(1, 5)] == counted
    assert all(a[key] < b[key] for a, b in zip(counted, counted[1:], strict=False) for key in ("paper", "true"))


def test_one_pass_of_thor_costs_half(tmp_path):
    flops = []
    for weight in (None, 2.0, 0.0):
        task, _ = toy(toy_config(tmp_path, "thor", consistency_weight=weight))
        flops.append(training_flops(task.config, flops_at_k(task, task.build_model()), task.config.steps))
    assert flops[0] == flops[1] == 2 * flops[2]


def test_a_layer_without_experts_counts_as_dense(tmp_path):
    every, later = (toy(toy_config(tmp_path, layers=layers))[0] for layers in ("all", "later"))
    assert [len(smoe.smoe_layers(task.model)) for task in (every, later)] == [2, 1]
    assert later.config.smoe_layers() == [1]
    # Of 20 points: an expert is 2 x 8 x 4 multiply-adds, a dense MLP 2 x 8 x 16; a router 8 x 4.
    rest = 20 * (2 * 8 + 8 * 3)
    for k in (1, 3):
        expert_layer, dense_layer = 20 * (8 * 4 + k * 2 * 8 * 4), 20 * 2 * 8 * 16
        assert every.flops(every.model, k)["paper"] == 2 * (rest + 2 * expert_layer)
        assert later.flops(later.model, k)["paper"] == 2 * (rest + expert_layer + dense_layer)


def test_a_record_has_every_metric_at_every_k_and_what_it_was_told(tmp_path):
    config = toy_config(tmp_path, sweep=(1, 2, 16), layers=(1,))
    task, processes = toy(config)
    task.record = {"own": "field"}
    swept = sweep(task, processes)
    record = make_record(task, [(16, {"step": 4, "value": 0.5})], {4: swept}, steps=12, processes=1)
    assert json.loads(json.dumps(record)) == record
    assert (record["metric"], record["own"], record["processes"]) == ("accuracy", "field", 1)
    assert record["best"] == {"step": 4, "metric": "accuracy", "value": 0.5, "k": 16}
    assert "best_at_other_k" not in record
    for metric in task.metrics:
        found = record["metrics"][metric.key]
        assert [found[name] for name in ("title", "unit", "direction")] == [metric.title, metric.unit, metric.direction]
        assert found["n"] == {"valid": 50, "test": 70}
        for split in ("valid", "test"):
            assert found[split] == {k: swept[split][k].values[metric.key] for k in ("1", "2")}
    assert record["parameters"]["active_per_k"].keys() == record["flops"].keys() == {"1", "2"}
    assert record["parameters"]["total"] == sum(p.numel() for p in task.model.parameters())
    assert not {"run_dir", "data", "resume", "progress"} & record["config"].keys(), "a record names no places"
    assert record["config"]["layers"] == [1] and record["config"]["seed"] == record["seed"] == 1
    assert record["label"] == "SMoE-Dropout, layers (1,)"


def test_a_record_of_a_dense_run_is_read_by_the_report(tmp_path):
    task, processes = toy(toy_config(tmp_path, "dense_dropblock"))
    assert set(sweep(task, processes)["test"]) == {"dense"}
    measured = {split: {"dense": Measured({"accuracy": 0.5, "cross_entropy": 1.0}, 10)} for split in ("valid", "test")}
    best = {"step": 8, "value": 0.5}
    record = make_record(task, [(None, best)], {8: measured}, steps=12, seconds={}, processes=1, environment={})
    assert record["metrics"]["accuracy"]["test"] == {"dense": 0.5} and "label" not in record
    assert record["parameters"]["active_per_k"] == {} and record["parameters"]["experts"] == 0
    assert check_result(record)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, None),
        ({"router": "hash"}, "SMoE-Dropout, router hash"),
        ({"k_min": 1, "schedule": "cosine"}, "SMoE-Dropout, schedule cosine, k_min 1"),
        ({"seed": 3, "steps": 5}, None),  # not another method
        ({"method": "thor", "consistency_weight": 0.0}, "THOR, consistency_weight 0.0"),
    ],
)
def test_a_run_that_departs_from_its_method_has_a_name(fields, name, tmp_path):
    assert label(toy_config(tmp_path, **fields)) == ({} if name is None else {"label": name})
