"""What a result says about where it came from and how large the model is."""

from __future__ import annotations

import json
import platform
import subprocess

import torch
from torch import nn

import smoe
from smoe.run.record import active_per_k, environment_record, git_state, parameter_counts


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
    }
    net[0].requires_grad_(False)
    assert parameter_counts(net)["trainable"] == experts
    net.append(net[0])  # a shared layer counts once
    assert parameter_counts(net)["total"] == experts + rest


def test_active_parameters_grow_by_one_expert_of_each_layer_until_it_has_no_more():
    net = model()
    counts = parameter_counts(net)
    one = [sum(p.numel() for p in layer.experts.parameters()) // layer.num_experts for layer in net[1:]]
    assert active_per_k(net, [1, 2, 4]) == {
        "1": counts["rest"] + one[0] + one[1],
        "2": counts["rest"] + 2 * one[0] + 2 * one[1],
        "4": counts["total"],  # the second layer has only two
    }
    assert active_per_k(nn.Linear(2, 3), [1, 8]) == {"1": 9, "8": 9}


def test_the_environment_is_plain_data():
    record = environment_record()
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["smoe"] == smoe.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert record["devices"] and record["cpu"]["model"] and record["cpu"]["cores"] >= 1
    assert record["date"].endswith("+00:00")


def test_git_state_tells_clean_from_dirty_and_no_checkout(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for arguments in (["init", "-q"], ["add", "f"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "untracked").write_text("")
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
