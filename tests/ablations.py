"""Trainings that depart from their method; what test_train.py and test_bert_pretrain.py ask of the two trainers.

``trainer(method, run_dir, *flags)`` runs one of them; ``task_of(run_dir)`` builds the task of a run again.
"""

import random
from pathlib import Path

import torch
from runs import lines, result, weights

from smoe import smoe_layers


def check_random_schedule(trainer, task_of, tmp_path: Path, mode: str) -> None:
    """Each step's k is drawn from the seed, and from the layer where there is one per layer; log and FLOPs have it."""
    run = tmp_path / "run"
    flags = ("--schedule", mode, "--k_min", 1, "--log_interval", 1, "--steps", 6, "--seed", 5, "--sweep", 16)
    command = trainer("smoe_dropout", run, *flags)
    assert command.wait() == 0, command.err
    assert f"k = 1..16 ({mode})" in command.out
    per_layer = mode == "random_per_layer"
    drawn = [[random.Random(f"5/{step}/{layer * per_layer}").randint(1, 16) for layer in (0, 1)] for step in range(6)]
    assert [line["k"] for line in lines(run).values()] == [a if a == b else [a, b] for a, b in drawn]
    assert any(a != b for a, b in drawn) == per_layer and len({tuple(ks) for ks in drawn}) > 2
    task, record = task_of(run), result(run)
    each = [task.flops(task.model, ks)["training_step"] for ks in drawn]
    assert record["training_flops"] == sum(each) and len(set(each)) > 2
    assert record["label"] == f"SMoE-Dropout, schedule {mode}, k_min 1"


def check_only_later_layers(trainer, task_of, tmp_path: Path, tokens: int) -> None:
    """Of the two layers the second one has experts; the first one is dense. ``tokens``: of an evaluation pass."""
    every, later = tmp_path / "every", tmp_path / "later"
    for run, layers in ((every, "all"), (later, "later")):
        command = trainer("smoe_dropout", run, "--steps", 2, "--layers", layers, "--sweep", "1,16")
        assert command.wait() == 0, command.err
    assert "16 experts, k = 8..16 (linear) in layers 1, seed 1" in command.out
    layers = {run: smoe_layers(task_of(run).model) for run in (every, later)}
    assert [len(layers[run]) for run in (every, later)] == [2, 1]
    assert layers[later][0][0] == layers[every][1][0], "not the second layer"
    d, width = layers[later][0][1].d_model, layers[later][0][1].d_hidden
    routers = [name for name in weights(later) if ".router." in name]
    assert routers and len([name for name in weights(every) if ".router." in name]) == 2 * len(routers)
    paper = {run: {k: cell["paper"] for k, cell in result(run)["flops"].items()} for run in (every, later)}
    # 15 experts more are 15/16 of an MLP's two matrices; a dense layer has all of them and no router.
    assert paper[later]["16"] - paper[later]["1"] == 2 * tokens * 2 * d * width * 15 // 16
    assert paper[every]["16"] - paper[every]["1"] == 2 * 2 * tokens * 2 * d * width * 15 // 16
    assert paper[every]["16"] - paper[later]["16"] == 2 * tokens * d * 16
    counts = {run: result(run)["parameters"] for run in (every, later)}
    assert counts[every]["experts"] == 2 * counts[later]["experts"]
    assert result(later)["label"] == "SMoE-Dropout, layers later"


def check_thor_with_one_pass(trainer, tmp_path: Path) -> None:
    """Without its consistency loss THOR makes one pass: a step costs half as much, and nothing is logged of it."""
    two, one = tmp_path / "two", tmp_path / "one"
    for run, flags in ((two, ()), (one, ("--consistency_weight", 0))):
        command = trainer("thor", run, *flags, "--steps", 2, "--log_interval", 1, "--sweep", "1,2")
        assert command.wait() == 0, command.err
    steps = {run: {k: cell["training_step"] for k, cell in result(run)["flops"].items()} for run in (two, one)}
    assert steps[two] == {k: 2 * flops for k, flops in steps[one].items()} and steps[one].keys() == {"1", "2"}
    assert result(two)["training_flops"] == 2 * result(one)["training_flops"] == 2 * steps[two]["2"]
    assert all("consistency" in line for line in lines(two).values())
    assert not any("consistency" in line for line in lines(one).values())
    assert any(not torch.equal(value, weights(one)[name]) for name, value in weights(two).items())
