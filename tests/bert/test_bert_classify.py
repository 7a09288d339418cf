"""Classifying sentences with BERT or RoBERTa: the task, its model against Transformers' own, its metric, bad input."""

import json

import fine_tuning
import interruptions
import processes
import pytest
import torch
from commands import rank_starter, starter
from example_data import record_sha256, write_sentences
from runs import assert_one_line, result
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from bert.classify import Classification, ClassifyConfig
from smoe.train.command import parse_config


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sentences"), {"train": 160, "valid": 23})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return {
        model: fine_tuning.tokenizer(model, tmp_path_factory.mktemp("tokenizer"), ["film", "great", "moving", "joy"])
        for model in ("bert", "roberta")
    }


@pytest.fixture
def classify_argv(sentences):
    argv = ["--scale", "smoke", "--data", sentences, "--precision", "fp32", "--progress", "false", "--sweep", "1,16"]
    return [str(word) for word in argv]


@pytest.fixture
def classify(start, classify_argv):
    return starter(start, "bert.classify", classify_argv)


def task_of(classify_argv, tokenizer, *flags, model="bert") -> Classification:
    argv = [*classify_argv, "--model", model, "--tokenizer", tokenizer[model], "--run_dir", "unused", *flags]
    return Classification(parse_config(ClassifyConfig, [str(word) for word in argv]), 0, 1)


def test_a_pretrained_run_is_fine_tuned_and_measured_at_any_k(pretrain, classify, start, sentences, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    assert pretrain("bert", "smoe_dropout", pretrained, "--sweep", 16).wait() == 0
    command = classify(run, "--run", pretrained, "--batch_size", 8)
    assert command.wait() == 0, command.err
    record = result(run)
    assert (record["task"], record["metric"], record["model"]) == ("classification", "accuracy", "bert")
    assert (record["dataset"]["name"], record["method"]) == ("sst2", "smoe_dropout")
    accuracy = record["metrics"]["accuracy"]
    assert accuracy["n"] == {"valid": 23} and record["floors"]["most_frequent_label"] == {"valid": 12 / 23}
    assert record["floors"]["bag_of_words"] == {"valid": 1.0} and "bag_of_words 1.0000" in command.out
    kept = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in (sentences / "valid.jsonl").read_text().splitlines()]
    for k in ("1", "16"):
        assert [line[k][1] for line in kept] == [
            int(line[k][0] == str(own)) for line, own in zip(kept, labels, strict=True)
        ]
        assert accuracy["valid"][k] == sum(line[k][1] for line in kept) / 23
    evaluated = start("bert.evaluate", run, "--k", 16, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert json.loads(evaluated.out)["accuracy"] == {"16": accuracy["valid"]["16"]}


def test_it_learns_which_word_decides(classify, tokenizer, tmp_path):
    flags = ("--method", "dense_dropout", "--model", "bert", "--tokenizer", tokenizer["bert"], "--steps", 100)
    flags += ("--learning_rate", "3e-3", "--batch_size", 16, "--warmup_steps", 20, "--dropout", 0, "--init_std", 0.1)
    command = classify(tmp_path / "run", *flags, "--eval_interval", 100)
    assert command.wait() == 0, command.err
    assert result(tmp_path / "run")["metrics"]["accuracy"]["valid"]["dense"] > 0.9


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_the_model_is_transformers_own(model, classify_argv, tokenizer):
    task = task_of(classify_argv, tokenizer, "--method", "dense_dropout", model=model)
    ours = task.model.eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": task.config.d_hidden,
    }
    sizes |= {"vocab_size": task.vocabulary.size, "pad_token_id": task.vocabulary.pad}
    if model == "bert":
        theirs = BertForSequenceClassification(BertConfig(max_position_embeddings=96, **sizes))
        heads = {"bert.pooler.dense": ours.pooler, "classifier": ours.score}
    else:
        config = RobertaConfig(max_position_embeddings=97 + task.vocabulary.pad, type_vocab_size=1, **sizes)
        config.layer_norm_eps = 1e-5
        theirs = RobertaForSequenceClassification(config)
        heads = {"classifier.dense": ours.pooler, "classifier.out_proj": ours.score}
    weights = {
        f"{model}.{name}".replace("intermediate.up", "intermediate.dense").replace(
            "intermediate.down", "output.dense"
        ): value
        for name, value in ours.encoder.state_dict().items()
    }
    weights |= {f"{name}.{part}": getattr(head, part) for name, head in heads.items() for part in ("weight", "bias")}
    theirs.load_state_dict(weights)
    ids, labels = task.collate(task.data["valid"][:6])
    there = (ids != task.vocabulary.pad).long()
    with torch.no_grad():
        expected, found = theirs.eval()(input_ids=ids, attention_mask=there, labels=labels), ours(ids, labels)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)


def test_a_sentence_is_as_transformers_makes_it(classify_argv, tokenizer):
    for model, (start, end) in {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}.items():
        task = task_of(classify_argv, tokenizer, "--method", "smoe", model=model)
        ids, labels = task.collate(task.data["valid"][:4])
        assert labels.tolist() == [0, 1, 0, 1] and ids.shape[0] == 4
        tokens = [task.tokenizer.id_to_token(int(i)) for i in ids[1] if i != task.vocabulary.pad]
        assert (tokens[0], tokens[1], tokens[-1]) == (start, "film", end)


def test_a_stopped_run_goes_on_with_the_same_bits(classify, tokenizer, tmp_path):
    flags = ("--method", "smoe_dropout", "--model", "bert", "--tokenizer", tokenizer["bert"])
    interruptions.check_kill_and_sigterm(classify, tmp_path, flags)


@pytest.mark.distributed
def test_two_processes_are_one(start_ranks, classify_argv, tokenizer, tmp_path):
    flags = ["--method", "smoe_dropout", "--model", "bert", "--tokenizer", tokenizer["bert"], "--dropout", 0]
    trainer = rank_starter(start_ranks, "bert.classify", [*classify_argv, *flags])
    processes.check_examples_on_two(trainer, tmp_path, "accuracy", "valid")


def test_bad_input_is_one_line(classify, tokenizer, tmp_path):
    whole = ("--method", "smoe", "--model", "bert", "--tokenizer", tokenizer["bert"])
    data = write_sentences(tmp_path / "data", {"train": 40, "valid": 11})
    (data / "valid.jsonl").write_text('{"text": "film", "label": 2}\n')
    record_sha256(data, "valid")
    assert_one_line(classify(tmp_path / "run", *whole, "--data", data), 2, "label 2, expected 0 or 1")
    assert_one_line(classify(tmp_path / "run", *whole, "--seq_len", 8), 2, "seq_len is 8; it must be at least")
    assert not (tmp_path / "run").exists()
