"""BERT and RoBERTa runs with fewer experts, and fine-tunings that keep those that their examples vote for."""

import json

import fine_tuning
import pytest
import torch
from runs import assert_one_line, lines, result

import smoe
from bert.evaluate import load_run
from bert.finetune import encode
from bert.math_word_problems import MathWordProblems
from bert.multiple_choice import MultipleChoice
from bert.question_answering import QuestionAnswering
from smoe.train.command import parse_config
from smoe.train.slimming import slim_task


@pytest.fixture
def run_with_tokenizer(pretrain, tmp_path):
    """run_with_tokenizer(model) -> a run of two steps whose tokenizer knows the words of the examples."""

    def run_with_tokenizer(model):
        run = tmp_path / f"{model}-run"
        command = pretrain(model, "smoe_dropout", run, "--steps", 2, "--sweep", "16", "--output_scale", "num_experts")
        assert command.wait() == 0, command.err
        return run

    return run_with_tokenizer


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_a_slimmed_run_is_the_whole_one_that_routes_among_the_kept(model, run_with_tokenizer, start, tmp_path):
    run, out, hf = run_with_tokenizer(model), tmp_path / "slimmed", tmp_path / "hf"
    command = start("bert.slim", run, "--keep", 6, "--out", out, "--score", "weight", "--batches", 2)
    assert command.wait() == 0, command.err
    (config, slimmed, _), (whole_config, whole, _) = load_run(out), load_run(run)
    assert (config.num_experts, config.d_hidden, config.output_scale) == (6, whole_config.d_hidden // 16 * 6, 16.0)
    votes = json.loads((out / "votes.json").read_text())["votes"]
    for name, layer in smoe.smoe_layers(whole):
        dropped = sorted(range(16), key=lambda e: (-votes[f"model.{name}"][e], e))[6:]  # noqa: B023
        layer.router.bias[dropped] = -1e4
    smoe.set_top_k(slimmed, 4)
    smoe.set_top_k(whole, 4)
    ids = torch.randint(6, 200, (2, 32))
    torch.testing.assert_close(slimmed(ids).logits, whole(ids).logits, atol=1e-6, rtol=1e-6)
    evaluated = start("bert.evaluate", out, "--k", 6, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert start("bert.to_hf", out, "--out", hf).wait() == 0
    smoe.set_top_k(slimmed, 6)
    torch.testing.assert_close(smoe.from_pretrained(hf)(ids).logits, slimmed(ids).logits)


WRITE = {
    MultipleChoice: fine_tuning.write_questions,
    MathWordProblems: fine_tuning.write_problems,
    QuestionAnswering: fine_tuning.write_paragraphs,
}


@pytest.mark.parametrize("task_class", WRITE)
def test_fine_tuning_keeps_the_experts_that_its_examples_vote_for(task_class, run_with_tokenizer, tmp_path):
    run = run_with_tokenizer("bert")
    data = WRITE[task_class](tmp_path / "data")
    argv = ["--run", run, "--scale", "smoke", "--data", data, "--run_dir", "x", "--batch_size", 8, "--seq_len", 128]
    argv = [str(word) for word in argv]
    config_class = task_class.config_class
    whole = task_class(parse_config(config_class, argv), 0, 1)
    task = task_class(parse_config(config_class, [*argv, "--keep", "5", "--vote_batches", "2"]), 0, 1)
    # Row by row, without padding, and the encoder alone.
    rows = [row for step in range(2) for row in whole.batch(step)[0].flatten(0, -2)]
    encoder, pad = whole.model.encoder, whole.vocabulary.pad

    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, ids):
            return encode(self.encoder, ids)

    smoe.set_top_k(encoder, 5)
    types = [{"ids": row[row != pad][None]} for row in rows]
    if task_class is not MathWordProblems:  # it has no second part
        second = [row for step in range(2) for row in whole.batch(step)[1].flatten(0, -2)]
        Alone.forward = lambda self, ids, types: encode(self.encoder, ids, token_type_ids=types)
        pairs = zip(types, rows, second, strict=True)
        types = [{**batch, "types": kinds[row != pad][None]} for batch, row, kinds in pairs]
    reader = Alone()
    votes = smoe.vote(reader, types)
    other = task_class(parse_config(config_class, argv), 0, 1)
    found = slim_task(other, 5, batches=2, device=torch.device("cpu"), token_mask=other.token_mask)
    assert found.keys() == votes.keys() and all(torch.equal(found[name], value) for name, value in votes.items())
    smoe.slim(reader, votes, keep=5)
    mine = task.model.encoder.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in encoder.state_dict().items())
    assert (task.config.num_experts, task.config.output_scale, task.config.ks_at(0)) == (5, 16.0, [5, 5])


def test_fine_tuning_starts_from_a_slimmed_run_and_is_slimmed_itself(run_with_tokenizer, start, tmp_path):
    run, out, tuned, again = run_with_tokenizer("bert"), *(tmp_path / name for name in ("out", "tuned", "again"))
    assert start("bert.slim", run, "--keep", 8, "--out", out, "--batches", 2).wait() == 0
    data = fine_tuning.write_questions(tmp_path / "data")
    flags = ["--scale", "smoke", "--data", data, "--precision", "fp32", "--progress", "false", "--batch_size", 8]
    command = start("bert.multiple_choice", "--run", out, "--run_dir", tuned, "--seq_len", 128, *flags)
    assert command.wait() == 0, command.err
    assert {line["k"] for line in lines(tuned).values()} == {8}
    assert result(tuned)["config"]["num_experts"] == 8
    assert start("bert.slim", tuned, "--keep", 3, "--out", again, "--batches", 2).wait() == 0
    evaluated = start("bert.evaluate", again, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert list(json.loads(evaluated.out)["accuracy"]) == ["1", "2", "3"]
    assert_one_line(start("bert.slim", tuned, "--keep", 9, "--out", tmp_path / "no"), 2, "keep is 9", "1 to 8")
    assert_one_line(start("transformer_xl.slim", tuned, "--keep", 3, "--out", tmp_path / "no"), 2, "Transformer-XL")
