"""Evaluation of a run at any k."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from runs import assert_one_line

from bert.config import PretrainConfig
from bert.data import evaluation_batches
from bert.evaluate import load_run
from bert.pretrain import MaskedLanguageModel
from smoe import get_top_k, set_top_k
from smoe.train.evaluation import measure
from smoe.train.processes import Processes

TINY = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_hidden": 64, "num_experts": 8, "seq_len": 32}
TINY |= {"precision": "fp32", "eval_batch_size": 3, "eval_sequences": 7}


def build(method, model, prepared):
    config = PretrainConfig(method, "unused", model=model, data=prepared(model), **TINY)
    processes = Processes()
    processes.configure(config)
    return MaskedLanguageModel(config, 0, 1), processes


def test_bpc_equals_a_naive_pass_with_labels(prepared, monkeypatch):
    monkeypatch.delattr("bert.pretrain.floors")  # seconds at real size; only a training needs them
    task, processes = build("smoe_dropout", "roberta", prepared)
    model, blocks = task.bare().train(), task.corpus
    set_top_k(model, 4)
    data = blocks.sequences("test", 32)
    measured, _ = measure(task, "test", 3, processes)
    assert get_top_k(model) == 4

    set_top_k(model.eval(), 3)
    batch = next(evaluation_batches(data, blocks.vocabulary, 7, 0.15, max_sequences=7))
    logits = model(batch.input_ids).logits.gather(
        1, batch.positions.unsqueeze(-1).expand(-1, -1, blocks.vocabulary.size)
    )
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    assert measured == {"bits_per_masked_token": pytest.approx(nats / math.log(2), abs=1e-5)}


def test_random_routing_is_evaluated_reproducibly_and_leaves_the_generator(prepared):
    task, processes = build("thor", "bert", prepared)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = measure(task, "valid", 2, processes)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert measure(task, "valid", 2, processes) == a


def test_command_gives_what_the_run_recorded(pretrain, start, tmp_path):
    run = tmp_path / "run"
    assert pretrain("bert", "smoe_dropout", run, "--sweep", "[1,4,8,16,20]").wait() == 0
    recorded = json.loads((run / "result.json").read_text())["metrics"]["bits_per_masked_token"]
    assert recorded["valid"].keys() == {"1", "4", "8", "16"}
    command = start("bert.evaluate", run, "--k", 1, 8, 16, "--json")
    assert command.wait() == 0, command.err
    assert json.loads(command.out)["bits_per_masked_token"] == {k: recorded["test"][k] for k in ("1", "8", "16")}
    config, model, _ = load_run(run)
    assert config.method == "smoe_dropout" and model.config.intermediate_size == 128
    last = run / "checkpoints" / "step-00000020" / "model.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    command = start("bert.evaluate", run, "--k", 1, "--checkpoint", "last")
    assert command.wait() == 0 and "going by step-00000010" in command.err
    for flags, words in ((["--k", 17], ["17", "16"]), (["--sequences", -1], ["sequences", "-1"])):
        command = start("bert.evaluate", run, *flags)
        assert command.wait() == 2
        *warnings, error = command.err.splitlines()
        assert error.startswith("error: ") and all(line.startswith("warning: ") for line in warnings)
        assert all(word in command.err for word in words)


def test_a_folder_without_a_run_is_one_line(start, tmp_path):
    command = start("bert.evaluate", tmp_path / "nothing")
    assert_one_line(command, 2, "nothing")


@pytest.mark.parametrize(
    "content", ["", "method: smoe\nrun_dir: x\nd_head: 64\n", "method: x\nrun_dir: y\nmodel: bert\n"]
)
def test_a_run_of_something_else_is_one_line(content, start, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    command = start("bert.evaluate", tmp_path)
    assert_one_line(command, 2, "config.yaml is not of a BERT or RoBERTa")
