"""Fine-tuning on sentences: the third task of the loop."""

import dataclasses
import json
import shutil

import interruptions
import processes
import pytest
import torch
from commands import rank_starter, starter
from example_data import record_sha256, write_sentences
from runs import assert_one_line, lines, result

from smoe import get_top_k, set_top_k
from smoe.train.command import parse_config
from smoe.train.folder import open_run
from smoe.train.processes import Processes
from transformer_xl.classify import Classification, ClassifyConfig


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sst2"), {"train": 90, "valid": 23})


@pytest.fixture
def classify_argv(sentences):
    return ["--scale", "smoke", "--data", sentences, "--precision", "fp32", "--progress", "false", "--sweep", "1,16"]


@pytest.fixture
def classify(start, classify_argv):
    return starter(start, "transformer_xl.classify", classify_argv)


def test_a_pretrained_run_is_fine_tuned_and_measured_at_any_k(train, classify, start, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    assert train("smoe_dropout", pretrained, "--sweep", 16, "--output_scale", "k").wait() == 0
    flags = ("--steps", 120, "--learning_rate", "1e-2", "--batch_size", 16, "--warmup_steps", 10, "--eval_interval", 60)
    command = classify(run, "--run", pretrained, *flags)
    assert command.wait() == 0, command.err
    record = result(run)
    assert (record["task"], record["metric"], record["method"]) == ("classification", "accuracy", "smoe_dropout")
    assert record["config"]["output_scale"] == "k", "what the run decides is taken from it"
    accuracy = record["metrics"]["accuracy"]
    assert accuracy["direction"] == "higher" and accuracy["n"] == {"valid": 23} and "test" not in accuracy
    assert accuracy["valid"].keys() == {"1", "16"} and accuracy["valid"]["16"] > 0.9
    assert accuracy["valid"]["16"] * 23 == pytest.approx(round(accuracy["valid"]["16"] * 23))
    assert record["pretrained"] == {"scale": "smoke", "seed": 1, "step": 20, "k_schedule": [8, 16, "linear"]}
    assert record["floors"] == {"most_frequent_label": {"valid": 12 / 23}, "bag_of_words": {"valid": 1.0}}
    assert "floors on valid: most_frequent_label 0.5217, bag_of_words 1.0000" in command.out
    assert str(tmp_path) not in json.dumps(record)
    assert {line["k"] for line in lines(run).values()} == {16}
    assert record["best"]["value"] == accuracy["valid"]["16"]
    shutil.rmtree(pretrained)  # a fine-tuned run is whole by itself
    evaluated = start("transformer_xl.evaluate", run, "--k", 16, "--json")
    assert evaluated.wait() == 0, evaluated.err
    report = json.loads(evaluated.out)
    assert (report["split"], report["n"], report["accuracy"]) == ("valid", 23, {"16": accuracy["valid"]["16"]})
    assert_one_line(start("transformer_xl.evaluate", run, "--tokens", 5), 2, "tokens", "classification")


def test_the_encoder_starts_from_the_run(train, sentences, tmp_path):
    pretrained = tmp_path / "pretrained"
    assert train("smoe", pretrained, "--sweep", 16).wait() == 0
    argv = ["--run", str(pretrained), "--scale", "smoke", "--data", str(sentences), "--run_dir", "x", "--seed", "5"]
    task = Classification(parse_config(ClassifyConfig, argv), 0, 1)
    from transformer_xl.evaluate import load_run

    _, model, _ = load_run(pretrained)
    encoder = task.model.encoder.state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in model.state_dict().items())
    assert task.config.ks_at(0) == [16, 16] and task.config.method == "smoe"


def test_padding_changes_nothing(sentences):
    config = ClassifyConfig("smoe_dropout", "x", num_layers=2, d_model=16, num_heads=2, d_head=8, d_hidden=64)
    task = Classification(dataclasses.replace(config, data=str(sentences)), 0, 1)
    model = task.model.eval()
    set_top_k(model, 3)
    rows = [(b"good", 1), (b"a much longer sentence .", 0), (b"x", 1)]
    together = model(*task.collate(rows)).logits
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(model(*task.collate([row])).logits[0], logits)
    # the classes are read at the last byte
    hidden, _ = model.encoder.encode(task.collate(rows[1:2])[0])
    torch.testing.assert_close(model.head(hidden[0, -1]), together[1])


def test_every_sentence_once_an_epoch_and_shares_that_make_a_batch(sentences):
    config = ClassifyConfig("smoe", "x", num_layers=1, d_model=8, num_heads=1, d_head=8, d_hidden=16, batch_size=9)
    config = dataclasses.replace(config, data=str(sentences))
    task, shares = Classification(config, 0, 1), [Classification(config, rank, 3) for rank in range(3)]
    rows = lambda batch: [(bytes(ids[:n].tolist()), int(c)) for ids, n, c in zip(*batch, strict=True)]  # noqa: E731
    epochs = [[row for step in range(e * 10, e * 10 + 10) for row in rows(task.batch(step))] for e in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(task.data["train"])
    assert [row for share in shares for row in rows(share.batch(13))] == rows(task.batch(13))


def test_evaluation_goes_by_length_and_says_what_it_would_in_order(sentences, monkeypatch):
    config = ClassifyConfig("smoe", "x", num_layers=1, d_model=8, num_heads=1, d_head=8, d_hidden=16, eval_batch_size=4)
    config = dataclasses.replace(config, data=str(sentences), batch_size=9)
    task, widths = Classification(config, 0, 1), []
    examples, device, collate = task.data["valid"], torch.device("cpu"), task.collate
    monkeypatch.setattr(task, "collate", lambda rows: [batch := collate(rows), widths.append(batch[0].shape[1])][0])
    model = task.model.eval()
    total = sum(task.passes(model, "valid", device))
    in_order = sum(max(len(text) for text, _ in examples[i : i + 4]) for i in range(0, len(examples), 4))
    assert widths == sorted(widths) and sum(widths) < in_order
    chosen = [model(*collate([example])).logits.argmax().item() for example in examples]
    said = lambda of: next(iter(of.predictions.joined([get_top_k(model)], Processes()).values()))  # noqa: E731
    assert said(task) == {
        str(i): (task.names[choice], choice == label)
        for i, (choice, (_, label)) in enumerate(zip(chosen, examples, strict=True))
    }
    shares = [Classification(config, rank, 3) for rank in range(3)]
    parts = [sum(share.passes(model, "valid", device)) for share in shares]
    assert torch.equal(sum(parts), total) and total[1] == len(examples)
    longest = [max(len(examples[int(i)][0]) for i in said(share)) for share in shares]
    assert min(longest) > sorted(len(text) for text, _ in examples)[11]  # each has its part of the long ones


def test_a_run_from_before_batches_were_grouped_goes_on_without(sentences, tmp_path):
    config = ClassifyConfig("smoe", str(tmp_path / "run"), data=str(sentences), steps=4)
    file = open_run(config, Processes()).config_path
    lines_before = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("group_by")]
    file.write_text("".join(lines_before))
    with pytest.raises(ValueError, match="group_by_length: True differs from False"):
        open_run(dataclasses.replace(config, resume=True, group_by_length=True), Processes())
    open_run(dataclasses.replace(config, resume=True), Processes())
    assert "group_by_length: false\n" in file.read_text()


def test_a_stopped_run_goes_on_with_the_same_bits(classify, tmp_path):
    interruptions.check_kill_and_sigterm(classify, tmp_path, ("--method", "thor"))


@pytest.mark.distributed
def test_two_processes_are_one(start_ranks, classify_argv, tmp_path):
    flags = ["--method", "smoe_dropout", "--dropout", 0, "--expert_dropout", 0]
    trainer = rank_starter(start_ranks, "transformer_xl.classify", [*classify_argv, *flags])
    processes.check_examples_on_two(trainer, tmp_path, "accuracy", "valid")
    assert result(tmp_path / "1")["metrics"]["accuracy"]["n"] == {"valid": 23}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["method", "missing"]),
        (["--run", "nowhere"], ["nowhere", "not a run folder"]),
        (["--method", "smoe", "--data", "/nowhere"], ["/nowhere", "prepare.py"]),
        (["--method", "smoe", "--batch_size", 100], ["batch_size", "100", "90"]),
        (["--method", "smoe", "--seq_len", 0], ["seq_len", "0"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, classify, tmp_path):
    assert_one_line(classify(tmp_path / "run", *flags), 2, *words)
    assert not (tmp_path / "run").exists()


def test_sizes_that_the_run_does_not_have(train, classify, tmp_path):
    pretrained = tmp_path / "pretrained"
    assert train("dense_dropout", pretrained).wait() == 0
    command = classify(tmp_path / "run", "--run", pretrained, "--d_hidden", 64)
    assert_one_line(command, 2, "d_hidden is 64", "need 128")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["bytes", "label", "meta"])
def test_damaged_data_is_named(damage, sentences, classify, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sentences, data)
    file = data / "valid.jsonl"
    if damage == "meta":
        (data / "meta.json").write_text("{}")
    else:
        changed = file.read_text().replace('"label": 1', '"label": 2' if damage == "label" else '"label": 0', 1)
        file.write_text(changed)
    if damage == "label":
        record_sha256(data, "valid")
    words = {"bytes": "SHA-256", "label": "label 2, expected 0 or 1", "meta": "damaged"}
    assert_one_line(classify(tmp_path / "run", "--method", "smoe", "--data", data), 2, words[damage], "--force")
