"""Choosing an answer: the task, its inputs and model against Transformers' own, its metric, and bad input."""

import json
import shutil

import fine_tuning
import interruptions
import processes
import pytest
import torch
from commands import rank_starter, starter
from example_data import write_examples
from runs import assert_one_line, result
from transformers import BertConfig, BertForMultipleChoice

from bert.multiple_choice import MultipleChoice, MultipleChoiceConfig
from smoe.train.command import parse_config


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return fine_tuning.write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return fine_tuning.tokenizer("bert", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def choose_argv(questions):
    argv = ["--scale", "smoke", "--data", questions, "--precision", "fp32", "--progress", "false", "--sweep", "1,16"]
    return [str(word) for word in argv]


@pytest.fixture
def choose(start, choose_argv):
    return starter(start, "bert.multiple_choice", choose_argv)


def task_of(choose_argv, tokenizer, *flags, model="bert") -> MultipleChoice:
    argv = [*choose_argv, "--model", model, "--tokenizer", tokenizer, "--run_dir", "unused", *flags]
    return MultipleChoice(parse_config(MultipleChoiceConfig, [str(word) for word in argv]), 0, 1)


def test_a_pretrained_run_is_fine_tuned_and_measured_at_any_k(pretrain, choose, start, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    assert pretrain("bert", "smoe_dropout", pretrained, "--sweep", 16).wait() == 0
    command = choose(run, "--run", pretrained, "--batch_size", 8)
    assert command.wait() == 0, command.err
    record = result(run)
    assert (record["task"], record["metric"], record["model"]) == ("multiple_choice", "accuracy", "bert")
    assert (record["dataset"]["name"], record["method"]) == ("csqa", "smoe_dropout")
    accuracy = record["metrics"]["accuracy"]
    assert accuracy["n"]["test"] == 23
    kept = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    answers = ["ABCDE"[fine_tuning.question(i)["answer"]] for i in range(23)]
    for k in ("1", "16"):
        assert [line[k][1] for line in kept] == [int(line[k][0] == a) for line, a in zip(kept, answers, strict=True)]
        assert accuracy["test"][k] == sum(line[k][1] for line in kept) / 23
    floors = record["floors"]
    assert floors["chance"] == {"valid": 0.2, "test": 0.2}
    assert floors["most_frequent_letter"]["test"] in {answers.count(letter) / 23 for letter in "ABCDE"}
    shutil.rmtree(pretrained)
    evaluated = start("bert.evaluate", run, "--k", 16, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert json.loads(evaluated.out)["accuracy"] == {"16": accuracy["test"]["16"]}


def test_it_learns_to_find_the_thing_that_the_question_names(choose, tokenizer, tmp_path):
    flags = ("--method", "dense_dropout", "--model", "bert", "--tokenizer", tokenizer, "--steps", 250)
    flags += ("--learning_rate", "3e-3", "--batch_size", 16, "--warmup_steps", 20, "--dropout", 0, "--init_std", 0.1)
    command = choose(tmp_path / "run", *flags, "--eval_interval", 125)
    assert command.wait() == 0, command.err
    assert result(tmp_path / "run")["metrics"]["accuracy"]["test"]["dense"] > 0.6


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_pairs_are_as_transformers_makes_them(model, choose_argv, tmp_path):
    task = task_of(choose_argv, fine_tuning.tokenizer(model, tmp_path), "--method", "smoe", model=model)
    ids, types, answers = task.collate(task.data["test"][:3])
    row = fine_tuning.question(1)
    assert answers[1] == row["answer"] and ids.shape[:2] == types.shape[:2] == (3, 5)
    found = [task.tokenizer.id_to_token(int(i)) for i in ids[1, 2] if i != task.vocabulary.pad]
    words = row["question"].split()
    choice = [row["choices"][2]]
    if model == "bert":
        assert found == ["[CLS]", *words, "[SEP]", *choice, "[SEP]"]
        second = len(words) + 2
        assert types[1, 2].tolist() == [0] * second + [1, 1] + [0] * (ids.shape[-1] - second - 2)
    else:
        assert found == ["<s>", *words, "</s>", "</s>", *choice, "</s>"]
        assert not types.any()


def test_the_model_is_transformers_own(choose_argv, tokenizer):
    """With the same weights, a dense chooser computes what BertForMultipleChoice does."""
    task = task_of(choose_argv, tokenizer, "--method", "dense_dropout")
    model = task.model.eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(vocab_size=task.vocabulary.size, max_position_embeddings=160, **sizes)
    config.pad_token_id = task.vocabulary.pad
    theirs = BertForMultipleChoice(config).eval()
    weights = {f"bert.{name}": value for name, value in model.encoder.state_dict().items()}
    for name in list(weights):
        renamed = name.replace("intermediate.up", "intermediate.dense").replace("intermediate.down", "output.dense")
        weights[renamed] = weights.pop(name)
    heads = {"bert.pooler.dense": model.pooler, "classifier": model.score}
    weights |= {
        f"{name}.{part}": getattr(linear, part) for name, linear in heads.items() for part in ("weight", "bias")
    }
    theirs.load_state_dict(weights)
    ids, types, answers = task.collate(task.data["test"][:6])
    expected = theirs(
        input_ids=ids, token_type_ids=types, attention_mask=(ids != task.vocabulary.pad).long(), labels=answers
    )
    ours = model(ids, types, answers)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.loss, expected.loss, atol=1e-5, rtol=1e-4)


def test_a_stopped_run_goes_on_with_the_same_bits(choose, tokenizer, tmp_path):
    flags = ("--method", "smoe_dropout", "--model", "bert", "--tokenizer", tokenizer)
    interruptions.check_kill_and_sigterm(choose, tmp_path, flags)


@pytest.mark.distributed
def test_two_processes_are_one(start_ranks, choose_argv, tokenizer, tmp_path):
    flags = ["--method", "smoe_dropout", "--model", "bert", "--tokenizer", tokenizer, "--dropout", 0]
    trainer = rank_starter(start_ranks, "bert.multiple_choice", [*choose_argv, *flags])
    processes.check_examples_on_two(trainer, tmp_path, "accuracy", "test")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**fine_tuning.question(0), "answer": 5}, "answer 5, expected 0 to 4"),
        ({**fine_tuning.question(0), "choices": ["a", "b"]}, "a question has 2 choices, expected 5"),
        ({"question": "what ?"}, "damaged ('choices')"),
    ],
)
def test_damaged_data_is_named(row, words, choose, tokenizer, tmp_path):
    rows = [fine_tuning.question(i) for i in range(20)]
    data = write_examples(tmp_path / "data", "csqa", {"train": rows, "test": [*rows, row]})
    flags = ("--method", "smoe", "--model", "bert", "--tokenizer", tokenizer, "--data", data)
    assert_one_line(choose(tmp_path / "run", *flags), 2, words, "--force")
    assert not (tmp_path / "run").exists()


def test_bad_flags_are_one_line(choose, tokenizer, tmp_path):
    whole = ("--method", "smoe", "--model", "bert", "--tokenizer", tokenizer)
    assert_one_line(choose(tmp_path / "run", *whole, "--seq_len", 8), 2, "seq_len is 8; it must be at least 1")
    assert_one_line(choose(tmp_path / "run", *whole, "--fold", 1), 2, "fold")
    assert not (tmp_path / "run").exists()
