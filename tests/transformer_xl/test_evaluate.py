"""Evaluation of a run at any k."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from runs import assert_one_line

from smoe import get_top_k, set_top_k
from smoe.train.evaluation import measure
from smoe.train.processes import Processes
from transformer_xl.config import LanguageModelConfig
from transformer_xl.data import load_data
from transformer_xl.evaluate import load_run
from transformer_xl.train import LanguageModel

TINY = {
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "d_head": 8,
    "d_hidden": 64,
    "num_experts": 8,
    "precision": "fp32",
}


def test_bpc_equals_a_naive_pass_over_each_row(data_dir):
    config = LanguageModelConfig(
        "smoe_dropout",
        "unused",
        **TINY,
        data=data_dir,
        eval_batch_size=3,
        eval_tgt_len=10,
        eval_mem_len=10_000,
        eval_tokens=120,
    )
    processes = Processes()
    processes.configure(config)
    task = LanguageModel(config, 0, 1)
    model = task.model.train()
    set_top_k(model, 4)
    data = load_data(data_dir)[0]["test"]
    measured, n = measure(task, "test", 3, processes)
    assert n == 120
    assert model.training and get_top_k(model) == 4

    # With memory that never runs out, segment by segment equals the whole row at once.
    set_top_k(model.eval(), 3)
    rows = torch.tensor(data[: len(data) // 3 * 3].reshape(3, -1)[:, :41].astype("int64"))
    logits = model(rows[:, :-1]).logits
    nats = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert measured == {"bpc": pytest.approx(nats / math.log(2), abs=1e-5)}


def test_random_routing_is_evaluated_reproducibly_and_leaves_the_generator(data_dir):
    config = LanguageModelConfig("thor", "unused", **TINY, data=data_dir, eval_tokens=200)
    processes = Processes()
    processes.configure(config)
    task = LanguageModel(config, 0, 1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = measure(task, "valid", 2, processes)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert measure(task, "valid", 2, processes) == a


def test_command_gives_what_the_run_recorded(train, start, tmp_path):
    run = tmp_path / "run"
    assert train("smoe_dropout", run).wait() == 0
    recorded = json.loads((run / "result.json").read_text())["metrics"]["bpc"]
    command = start("transformer_xl.evaluate", run, "--k", 1, 8, 16, "--json")
    assert command.wait() == 0, command.err
    report = json.loads(command.out)
    assert report["bpc"] == {k: recorded["test"][k] for k in ("1", "8", "16")}
    config, model, _ = load_run(run)
    assert config.method == "smoe_dropout" and len(list(model.layers)) == 2


def test_a_bad_value_is_one_line(train, start, tmp_path):
    run = tmp_path / "run"
    assert train("smoe_dropout", run, "--steps", 2).wait() == 0
    for flags, words in (
        (["--k", 17], ["17", "16"]),
        (["--k", 0], ["0"]),
        (["--k", "all"], ["k", "all"]),
        (["--tokens", -1], ["tokens", "-1"]),
        (["--tokens", 2], ["eval_tokens", "2", "4"]),
    ):
        assert_one_line(start("transformer_xl.evaluate", run, *flags), 2, *words)


def test_a_folder_without_a_run_is_one_line(start, tmp_path):
    command = start("transformer_xl.evaluate", tmp_path / "nothing")
    assert_one_line(command, 2, "nothing")


@pytest.mark.parametrize("content", ["", "model: bert\nsweep: [1]\n"])
def test_a_run_of_something_else_is_one_line(content, start, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    command = start("transformer_xl.evaluate", tmp_path)
    assert_one_line(command, 2, "config.yaml is not of a Transformer-XL")
