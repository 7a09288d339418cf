"""Distillation: the fourth task of the Transformer-XL."""

import json
import shutil

import interruptions
import pytest
import torch
import torch.nn.functional as F
from commands import starter
from example_data import write_sentences
from runs import assert_one_line, result

from smoe import set_top_k
from smoe.train.command import parse_config
from transformer_xl.distil import DistilConfig, Distillation, distillation_loss


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sst2"), {"train": 90, "valid": 23})


@pytest.fixture
def argv(sentences):
    return ["--scale", "smoke", "--data", sentences, "--precision", "fp32", "--progress", "false", "--sweep", "16"]


@pytest.fixture
def teacher(start, argv, tmp_path):
    flags = ("--method", "smoe_dropout", "--batch_size", 16, "--warmup_steps", 10, "--learning_rate", "1e-2")
    run = tmp_path / "teacher"
    trained = start("transformer_xl.classify", *argv, *flags, "--steps", 80, "--eval_interval", 80, "--run_dir", run)
    assert trained.wait() == 0, trained.err
    return run


@pytest.fixture
def distil(start, argv):
    return starter(start, "transformer_xl.distil", argv)


def test_the_loss_is_the_one_of_the_paper_of_hinton():
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    hard = F.cross_entropy(logits, labels)
    found = distillation_loss(hard, logits, teacher, 0.3, 4.0)
    expected = 0.0
    for row, own, label in zip(logits, teacher, labels, strict=True):
        p, q = (torch.exp(v / 4) / torch.exp(v / 4).sum() for v in (own, row))
        plain = torch.exp(row) / torch.exp(row).sum()
        expected += (0.7 * -plain[label].log() + 0.3 * 16 * (p * (p / q).log()).sum()) / 5
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    )


def test_a_teacher_is_distilled_stopped_and_measured_without_it(teacher, distil, start, tmp_path):
    flags = ("--teacher", teacher, "--batch_size", 8, "--learning_rate", "1e-2")
    interruptions.check_kill_and_sigterm(distil, tmp_path, flags)
    run = tmp_path / "alone"
    record = result(run)
    assert (record["task"], record["method"], record["metric"]) == ("distillation", "dense_dropout", "accuracy")
    assert record["teacher"] == {
        "method": "smoe_dropout", "d_hidden": 128, "scale": "smoke", "seed": 1, "step": 80,
        "k_schedule": [16, 16, "constant"], "num_experts": 16, "score": "softmax_after_topk", "output_scale": 1,
    }  # fmt: skip
    assert record["config"]["d_hidden"] == 128 // 16 and "teacher" not in record["config"]
    assert str(tmp_path) not in json.dumps(record)
    accuracy = record["metrics"]["accuracy"]["valid"]["dense"]
    assert accuracy > 0.8
    shutil.rmtree(teacher)
    evaluated = start("transformer_xl.evaluate", run, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert json.loads(evaluated.out)["accuracy"] == {"dense": accuracy}


def test_the_student_learns_from_the_teacher_with_all_its_experts(teacher, argv):
    flags = [*argv, "--teacher", teacher, "--run_dir", "x", "--dropout", 0, "--soft_weight", 1, "--temperature", 3]
    task = Distillation(parse_config(DistilConfig, [str(flag) for flag in flags]), 0, 1)
    batch = task.batch(0)
    loss, logits = task.forward(task.model, batch, torch.device("cpu"))
    (own,) = task._teacher
    set_top_k(own, 16)
    expected = distillation_loss(torch.tensor(0.0), logits, own(*batch).logits, 1.0, 3.0)
    torch.testing.assert_close(loss, expected)
    assert not any(parameter.requires_grad for parameter in own.parameters()) and not own.training
    assert not {id(p) for p in task.model.parameters()} & {id(p) for p in own.parameters()}
    task.model.eval()
    torch.testing.assert_close(
        task.forward(task.model, batch, torch.device("cpu")).loss, F.cross_entropy(logits, batch[2])
    )


def test_what_is_no_teacher_is_one_line(train, distil, tmp_path):
    pretrained = tmp_path / "pretrained"
    assert train("smoe", pretrained, "--sweep", 16, "--steps", 2).wait() == 0
    for flags, message in (
        ((), "teacher: missing; give --teacher"),
        (("--teacher", "null"), "teacher: missing; give --teacher"),
        (("--teacher", tmp_path), "is not a run folder"),
        (("--teacher", pretrained), "is not a run of transformer_xl.classify"),
    ):
        assert_one_line(distil(tmp_path / "run", *flags), 2, message)
    assert not (tmp_path / "run").exists()
