"""Runs with fewer experts: which ones stay, what is written, and that evaluation and fine-tuning start from it."""

import dataclasses
import json
import shutil

import pytest
import torch
from example_data import write_sentences
from runs import assert_one_line, lines, result, weights

import smoe
from smoe.report.runs import read_run
from smoe.report.transfer import kind_of
from smoe.train.command import parse_config
from smoe.train.slimming import slim_task
from transformer_xl.classify import Classification, ClassifyConfig
from transformer_xl.cost import evaluation_flops
from transformer_xl.evaluate import load_run
from transformer_xl.train import LanguageModel


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    write_sentences(folder, {"train": 90, "valid": 23})
    return folder


@pytest.fixture(scope="module")
def kept_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def pretrained(train, kept_runs):
    """A run of SMoE-Dropout whose output scale is N."""
    run = kept_runs / "smoe_dropout"
    if not run.exists():
        command = train("smoe_dropout", run, "--sweep", 16, "--output_scale", "num_experts")
        assert command.wait() == 0, command.err
    return run


@pytest.fixture
def slim(start):
    def slim(run, out, *flags):
        command = start("transformer_xl.slim", run, "--out", out, *flags)
        command.wait()
        return command

    return slim


def kept_of(out):
    """By layer: the experts with the highest votes, ascending, by a sort of our own."""
    votes = json.loads((out / "votes.json").read_text())
    ranked = {name: sorted(range(len(v)), key=lambda e: (-v[e], e)) for name, v in votes["votes"].items()}
    return {name: sorted(order[: votes["keep"]]) for name, order in ranked.items()}


@pytest.mark.parametrize("score", ["count", "weight", "reap"])
def test_a_slimmed_run_is_the_whole_one_that_routes_among_the_kept(score, pretrained, slim, tmp_path):
    out = tmp_path / "slimmed"
    command = slim(pretrained, out, "--keep", 6, "--score", score, "--batches", 3)
    assert command.wait() == 0 and command.out.startswith("6 of 16 experts per layer"), command.err
    config, model, checkpoint = load_run(out)
    whole_config, whole, whole_checkpoint = load_run(pretrained)
    assert (config.num_experts, config.d_hidden, config.output_scale) == (6, whole_config.d_hidden // 16 * 6, 16.0)
    assert (config.k_schedule(), config.sweep_ks()) == ((3, 6, "linear"), [6])
    assert checkpoint.step == whole_checkpoint.step and set(checkpoint.tensors) == {"model"}
    kept = kept_of(out)
    for name, layer in smoe.smoe_layers(whole):
        dropped = torch.ones(16, dtype=torch.bool).index_fill(0, torch.tensor(kept[name]), False)
        layer.router.bias.masked_fill_(dropped, -1e4)
    ids = torch.randint(256, (3, 50))
    for k in (2, 6):
        smoe.set_top_k(model.eval(), k)
        smoe.set_top_k(whole.eval(), k)
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-6, rtol=1e-6)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "checkpoints", "votes.json"}


def test_the_votes_are_those_of_the_training_data_with_its_memory(pretrained, slim, tmp_path):
    assert slim(pretrained, tmp_path / "out", "--keep", 4, "--k", 3, "--batches", 5).wait() == 0
    config, model, _ = load_run(pretrained)
    task = LanguageModel(config, 0, 1)
    smoe.set_top_k(model.eval(), 3)
    counts = {name: torch.zeros(16) for name, _ in smoe.smoe_layers(model)}
    memory = None
    for step in range(5):
        with torch.no_grad(), smoe.record_routing(model) as routings:
            memory = model(task.batch(step)[0], None, memory, config.mem_len).memory
        for name, routing in zip(counts, routings, strict=True):
            counts[name] += torch.bincount(routing.indices.flatten(), minlength=16)
    votes = json.loads((tmp_path / "out" / "votes.json").read_text())
    assert votes["votes"] == {name: count.tolist() for name, count in counts.items()}
    assert (votes["keep"], votes["k"], votes["score"], votes["batches"]) == (4, 3, "count", 5)


def test_to_keep_all_is_the_identity(pretrained, slim, tmp_path):
    assert slim(pretrained, tmp_path / "out", "--keep", 16).wait() == 0
    (config, _, _), (whole_config, _, _) = load_run(tmp_path / "out"), load_run(pretrained)
    assert dataclasses.replace(config, run_dir=whole_config.run_dir) == whole_config
    before, after = weights(pretrained), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("keep", [16, 8])
def test_its_training_cannot_be_resumed(keep, pretrained, slim, start, tmp_path):
    out = tmp_path / "out"
    assert slim(pretrained, out, "--keep", keep, "--batches", 2).wait() == 0
    command = start("transformer_xl.train", "--config", out / "config.yaml", "--run_dir", out, "--resume")
    assert_one_line(command, 2, "slimmed", "state.json", "start another run")


def test_less_kept_is_smaller_in_every_respect(pretrained, slim, tmp_path):
    sizes = []
    for keep in (16, 8, 2):
        out = tmp_path / str(keep)
        assert slim(pretrained, out, "--keep", keep, "--batches", 2).wait() == 0
        file = next((out / "checkpoints").glob("*/model.safetensors"))
        flops = evaluation_flops(load_run(out)[1], keep, batch=2, tgt_len=16, mem_len=16)
        sizes.append((file.stat().st_size, *(flops[name] for name in ("paper", "true", "params_total"))))
    assert all(a > b for more, less in zip(sizes, sizes[1:], strict=False) for a, b in zip(more, less, strict=True))


def test_it_is_evaluated_slimmed_again_and_fine_tuned(pretrained, slim, start, sentences, tmp_path):
    out, again, tuned = tmp_path / "out", tmp_path / "again", tmp_path / "tuned"
    assert slim(pretrained, out, "--keep", 8, "--batches", 2).wait() == 0
    evaluated = start("transformer_xl.evaluate", out, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert list(json.loads(evaluated.out)["bpc"]) == ["8"]
    flags = ["--scale", "smoke", "--data", sentences, "--precision", "fp32", "--progress", "false"]
    command = start("transformer_xl.classify", "--run", out, "--run_dir", tuned, *flags)
    assert command.wait() == 0, command.err
    assert {line["k"] for line in lines(tuned).values()} == {8}
    record = result(tuned)
    assert (record["config"]["num_experts"], record["config"]["output_scale"]) == (8, 16.0)
    other = write_sentences(tmp_path / "other", {"train": 60, "valid": 20}) / "meta.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"sha256": "1" * 64}))
    for given, words in ((), ""), (("--data", tmp_path / "other"), f"warning: {tmp_path}/other holds other data than"):
        evaluated = start("transformer_xl.evaluate", tuned, *given)
        assert evaluated.wait() == 0 and evaluated.err.startswith(words) and bool(evaluated.err) == bool(words)
    # In reports it is half of what was trained, k = N/2, also where it loses more.
    started = {"scale": "smoke", "seed": 1, "num_experts": 16, "k_schedule": [8, 16, "linear"]}
    assert started.items() <= record["pretrained"].items()
    kind = kind_of(read_run(record, "tuned"))
    assert (kind.kept, kind.of, kind.row, kind.size) == (8, 16, "smoe_dropout_k_half", (2, 128))
    twice = tmp_path / "twice"
    assert slim(out, twice, "--keep", 6, "--batches", 2).wait() == 0
    argv = classify_argv(twice, sentences, "--keep", 4, "--batch_size", 8)
    assert started.items() <= Classification(parse_config(ClassifyConfig, argv), 0, 1).record["pretrained"].items()
    assert slim(tuned, again, "--keep", 3, "--score", "reap", "--batches", 2).wait() == 0
    assert start("transformer_xl.evaluate", again, "--k", 3).wait() == 0
    votes = json.loads((again / "votes.json").read_text())["votes"]
    assert {name: len(scores) for name, scores in votes.items()} == {f"encoder.layers.{i}.mlp": 8 for i in range(2)}


# ---- --keep of fine-tuning
def classify_argv(run, sentences, *flags):
    argv = ["--run", run, "--scale", "smoke", "--data", sentences, "--run_dir", "unused", *flags]
    return [str(word) for word in argv]


def test_fine_tuning_keeps_the_experts_that_its_sentences_vote_for(pretrained, sentences):
    argv = classify_argv(pretrained, sentences, "--batch_size", 8)
    whole = Classification(parse_config(ClassifyConfig, argv), 0, 1)
    task = Classification(parse_config(ClassifyConfig, [*argv, "--keep", "5", "--vote_batches", "3"]), 0, 1)
    alone = [
        (ids[:n][None], n[None], c[None]) for step in range(3) for ids, n, c in zip(*whole.batch(step), strict=True)
    ]
    smoe.set_top_k(whole.model, 5)
    votes = smoe.vote(whole.model, alone)
    other = Classification(parse_config(ClassifyConfig, argv), 0, 1)
    found = slim_task(other, 5, batches=3, device=torch.device("cpu"), token_mask=other.token_mask)
    assert found.keys() == votes.keys() and all(torch.equal(found[name], value) for name, value in votes.items())
    smoe.slim(whole.model, votes, keep=5)
    mine, expected = task.model.encoder.state_dict(), whole.model.encoder.state_dict()
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], value) for name, value in expected.items())
    config = task.config
    assert (config.num_experts, config.d_hidden, config.output_scale, config.sweep) == (5, 40, 16.0, (1, 2, 4, 5))
    assert config.ks_at(0) == [5, 5], "all kept experts are active"
    found = task.record["pretrained"]
    assert (found["num_experts"], found["vote"]) == (16, {"score": "count", "batches": 3})


def test_a_run_that_kept_some_is_whole_by_itself(train, start, sentences, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    assert train("thor", pretrained, "--sweep", 16, "--steps", 4).wait() == 0
    flags = ["--scale", "smoke", "--data", sentences, "--precision", "fp32", "--progress", "false", "--keep", 4]
    command = start("transformer_xl.classify", "--run", pretrained, "--run_dir", run, *flags, "--vote_score", "reap")
    assert command.wait() == 0, command.err
    record = result(run)
    assert (record["config"]["keep"], record["config"]["num_experts"]) == (4, 4)
    assert record["pretrained"]["vote"] == {"score": "reap", "batches": 22}, "an epoch at most"
    shutil.rmtree(pretrained)
    evaluated = start("transformer_xl.evaluate", run, "--k", 4, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert json.loads(evaluated.out)["accuracy"]["4"] == record["metrics"]["accuracy"]["valid"]["4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", 17], "keep is 17; it must be from 1 to 16, the experts of"),
        (["--keep", 0], "keep is 0; it must be from 1 to 16"),
        (["--keep", 8, "--num_experts", 4, "--d_hidden", 32], "num_experts is 4; with 8 of the experts of"),
        (["--vote_batches", 2], "vote_batches is 2, which has no effect without keep"),
        (["--keep", 8, "--vote_batches", 0], "vote_batches is 0; it must be a number at least 1"),
        (["--keep", 8, "--vote_score", "norm"], "vote_score"),
    ],
)
def test_a_keep_that_does_not_fit(flags, message, pretrained, sentences):
    with pytest.raises(ValueError, match=message):
        Classification(parse_config(ClassifyConfig, classify_argv(pretrained, sentences, *flags)), 0, 1)


def test_keep_without_a_run():
    with pytest.raises(ValueError, match="keep is 8, which has no effect without run"):
        ClassifyConfig("smoe", "x", keep=8)


# ---- errors of the command
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--keep"]),
        (["--keep", 0], ["keep is 0", "1 to 16"]),
        (["--keep", 17], ["keep is 17", "1 to 16"]),
        (["--keep", "all"], ["keep", "all"]),
        (["--keep", 8, "--k", 17], ["--k is 17", "1 to 16"]),
        (["--keep", 8, "--k", 16], ["--k is 16", "same count"]),
        (["--keep", 8, "--batches", 0], ["--batches is 0", "at least 1"]),
        (["--keep", 8, "--score", "norm"], ["score", "norm", "reap"]),
        (["--keep", 8, "--data", "/nowhere"], ["/nowhere"]),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(flags, words, pretrained, slim, tmp_path):
    (tmp_path / "out").mkdir()
    assert_one_line(slim(pretrained, tmp_path / "out" / "run", *flags), 2, *words)
    assert not list((tmp_path / "out").iterdir())


def test_runs_that_cannot_be_slimmed(train, slim, pretrained, tmp_path):
    dense, some, out = tmp_path / "dense", tmp_path / "some", tmp_path / "out"
    assert train("dense_dropout", dense, "--steps", 2).wait() == 0
    assert_one_line(slim(dense, out, "--keep", 8), 2, "dense_dropout", "has no experts")
    assert train("smoe_dropout", some, "--steps", 2, "--sweep", 16, "--layers", "early").wait() == 0
    assert_one_line(slim(some, out, "--keep", 8), 2, "layers is 'early'", "dense MLPs")
    assert_one_line(slim(tmp_path / "nothing", out, "--keep", 8), 2, "nothing", "not a run folder")
    (tmp_path / "config.yaml").write_text("model: bert\nsweep: [1]\n")
    assert_one_line(slim(tmp_path, out, "--keep", 8), 2, "config.yaml is not of a Transformer-XL")
    damaged = tmp_path / "damaged"
    shutil.copytree(pretrained, damaged)
    for file in (damaged / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert_one_line(slim(damaged, out, "--keep", 8), 1, "no usable checkpoint")
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    assert_one_line(slim(pretrained, out, "--keep", 8), 2, "out:", "is there already")
    assert [path.name for path in out.iterdir()] == ["mine"]
