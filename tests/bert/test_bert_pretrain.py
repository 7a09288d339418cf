"""The trainer: run folder, resume bit for bit, several processes, and what it says when something is wrong."""

import json
from functools import partial

import ablations
import interruptions
import pytest
import torch
from runs import assert_one_line, lines, losses, result, weights
from safetensors.torch import load_file

from bert.config import PretrainConfig
from bert.pretrain import MaskedLanguageModel
from smoe import METHODS
from smoe.report import check_result, slimming_table
from smoe.train.command import parse_config
from smoe.train.evaluate import read_run


@pytest.mark.parametrize(
    ("model", "method"),
    [*(("bert", method) for method in METHODS), ("roberta", "smoe_dropout")],
)
def test_every_method_trains_and_leaves_a_full_run_folder(model, method, pretrain, prepared, tmp_path):
    run = tmp_path / "run"
    command = pretrain(model, method, run, "--learning_rate", "1e-2")
    assert command.wait() == 0, command.err
    record = result(run)
    assert (record["model"], record["method"], record["scale"], record["seed"]) == (model, method, "smoke", 1)
    assert (record["task"], record["metric"]) == ("masked_lm", "bits_per_masked_token")
    meta = json.loads((prepared(model) / "meta.json").read_text())
    assert record["dataset"]["sha256"] == meta["sha256"] and record["dataset"]["name"] == "text"
    keys = {"1", "16"} if METHODS[method].routed else {"dense"}
    for split in ("valid", "test"):
        bits = record["metrics"]["bits_per_masked_token"][split]
        assert bits.keys() == keys and all(3 < value < 9 for value in bits.values())
    assert record["flops"].keys() == keys and record["tokens_per_step"] == 4 * 32
    assert all(cell["true"] > 0 and cell["training_step"] > 0 for cell in record["flops"].values())
    assert record["config"]["d_hidden"] == (128 if model == "bert" else 64)
    assert model in slimming_table([check_result(record)])
    assert not {"run_dir", "data"} & record["config"].keys(), "a record says nothing of places"
    assert record["floors"].keys() == {"unigram", "two_sided_bigram", "unigram_shown", "two_sided_bigram_shown"}
    assert all(0 < floor[split] < 9 for floor in record["floors"].values() for split in ("valid", "test"))
    measured = losses(run)
    assert list(measured) == [5, 10, 15, 20]
    assert measured[20] < measured[5] - 0.1, "nothing was learned"
    extra = {"thor": "consistency", "smoe": "balance", "dense_concrete_dropout": "concrete"}.get(method)
    assert extra is None or lines(run)[20][extra] != 0
    assert (run / "tokenizer.json").read_bytes() == (prepared(model) / "tokenizer.json").read_bytes()
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_sequences_that_do_not_start_with_their_token_are_said(prepared):
    def notes(**sizes):
        options = {"model": "bert", "data": prepared("bert"), "num_layers": 1, "d_model": 16, "num_heads": 2}
        config = PretrainConfig("smoe_dropout", "unused", d_hidden=32, batch_size=2, **options, **sizes)
        return MaskedLanguageModel(config, 0, 1).notes()

    cut = notes(seq_len=32)[-1]
    assert "each block of 64 tokens is cut into 2 sequences of seq_len = 32, of which only the first starts" in cut
    assert not [line for line in notes(seq_len=64) if "[CLS]" in line]


LONG = ("--steps", 30, "--eval_interval", 15, "--save_interval", 3, "--log_interval", 1)


def test_k_and_learning_rate_follow_the_step_and_the_router_stays_fixed(pretrain, tmp_path):
    run = tmp_path / "run"
    assert pretrain("bert", "smoe_dropout", run, "--log_interval", 1, "--save_interval", 5).wait() == 0
    assert [line["k"] for line in lines(run).values()] == [round(8 * step / 20) + 8 for step in range(20)]
    assert [line["lr"] for line in lines(run).values()] == pytest.approx([1e-3 * (1 - s / 20) for s in range(20)])
    early, late = weights(run, 15), weights(run, 20)
    routers = [name for name in early if ".router." in name]
    assert len(routers) >= 2
    assert all(torch.equal(early[name], late[name]) for name in routers)
    experts = [name for name in early if ".experts." in name]
    assert experts and not any(torch.equal(early[name], late[name]) for name in experts)


def test_beta2_and_the_initialisation_reach_the_training(pretrain, tmp_path):
    run = tmp_path / "run"
    flags = ("--steps", 1, "--beta2", 0.75, "--init_std", 0.05, "--position_init", "sinusoid", "--key_init", "query")
    assert pretrain("bert", "smoe_dropout", run, *flags, "--learning_rate", 1e-9).wait() == 0
    state = load_file(run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    name = "state/cls.predictions.bias"
    # After one step Adam's means are (1 - beta1) g and (1 - beta2) g^2; its beta1 is 0.9.
    gradient = state[f"{name}/exp_avg"] / 0.1
    torch.testing.assert_close(state[f"{name}/exp_avg_sq"], 0.25 * gradient**2)
    end = weights(run)
    attention = "bert.encoder.layer.0.attention.self"
    torch.testing.assert_close(end[f"{attention}.query.weight"], end[f"{attention}.key.weight"])
    assert end[f"{attention}.query.weight"].std().item() == pytest.approx(0.05, rel=0.1)
    assert end["bert.embeddings.position_embeddings.weight"][0, 1].item() == pytest.approx(0.1, abs=1e-5)


def task_of(run):
    return MaskedLanguageModel(read_run(run, PretrainConfig, "a BERT or RoBERTa", "last")[0], 0, 1)


@pytest.mark.parametrize("mode", ["random", "random_per_layer"])
def test_a_random_schedule_is_logged_for_every_layer(mode, pretrain, tmp_path):
    ablations.check_random_schedule(partial(pretrain, "bert"), task_of, tmp_path, mode)


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_only_some_layers_may_have_experts(model, pretrain, tmp_path):
    ablations.check_only_later_layers(partial(pretrain, model), task_of, tmp_path, tokens=16 * 32)


def test_thor_without_its_consistency_loss_makes_one_pass(pretrain, tmp_path):
    ablations.check_thor_with_one_pass(partial(pretrain, "roberta"), tmp_path)


def test_a_run_killed_three_times_ends_with_the_same_bits(pretrain, tmp_path):
    trainer = partial(pretrain, "bert", "smoe_dropout")
    interruptions.check_kills(trainer, tmp_path, kills=3, steps=30, log_interval=1)


def test_sigterm_writes_a_checkpoint_that_resume_goes_on_from(pretrain, tmp_path):
    # The stop falls between two lines of metrics: the losses before it count in the next one.
    trainer = partial(pretrain, "roberta", "thor")
    interruptions.check_sigterm(trainer, tmp_path, ("--log_interval", 20), stop_at=20, steps=60)


def test_a_run_whose_training_was_done_needs_the_sweep_alone(pretrain, tmp_path):
    run = tmp_path / "run"
    assert pretrain("bert", "smoe", run).wait() == 0
    before = result(run)["metrics"]
    (run / "result.json").unlink()
    again = pretrain("bert", "smoe", run, "--resume")
    assert again.wait() == 0, again.err
    assert result(run)["metrics"] == before
    finished = pretrain("bert", "smoe", run, "--resume")
    assert finished.wait() == 0 and "is finished" in finished.out


def test_non_finite_loss_stops_before_the_optimizer_step(pretrain, tmp_path):
    run = tmp_path / "run"
    command = pretrain("bert", "smoe_dropout", run, "--learning_rate", "1e30", "--save_interval", 1)
    assert_one_line(command, 1, "not finite at step")
    assert all(tensor.isfinite().all() for tensor in weights(run).values() if tensor.is_floating_point())
    assert not (run / "result.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seq_len", "48"], ["seq_len", "48", "64"]),
        (["--data", "/nowhere"], ["/nowhere", "prepare.py"]),
        (["--model", "roberta"], ["tokens for bert", "--model roberta"]),
        (["--batch_size", "100000"], ["batch_size", "100000"]),
        (["--k_max", "17"], ["k_max", "17", "16"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, pretrain, tmp_path):
    run = tmp_path / "run"
    assert_one_line(pretrain("bert", "smoe_dropout", run, *flags), 2, *words)
    assert not run.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--k_min", "0"], ["k_min", "0", "1"]),
        (["--d_hidden", "100"], ["d_hidden", "100", "96", "112"]),
        (["--method", "smoe_dropuot"], ["method", "smoe_dropuot", "smoe_dropout"]),
        (["--model", "gpt"], ["model", "gpt", "roberta"]),
        (["--router", "hash"], ["router", "hash", "random"]),
        (["--num_heads", "3"], ["num_heads", "3", "32"]),
        (["--mask_share", "1.5"], ["mask_share", "1.5"]),
        (["--output_scale", "half"], ["output_scale", "half", "num_experts"]),
        (["--sweep", "[0]"], ["sweep", "0"]),
        (["--stesp", "10"], ["stesp", "steps"]),
    ],
)
def test_a_bad_configuration_names_field_value_and_what_would_be_right(flags, words):
    argv = ["--model", "bert", "--method", "smoe_dropout", "--scale", "smoke", "--run_dir", "unused", *flags]
    with pytest.raises(ValueError) as caught:
        parse_config(PretrainConfig, argv)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("scale", ["paper", "hour", "cpu", "smoke"])
def test_scales_are_whole_and_have_a_width_for_each_model(scale):
    for model, width in (("bert", "d_hidden_bert"), ("roberta", "d_hidden_roberta")):
        argv = ["--model", model, "--method", "smoe_dropout", "--scale", scale, "--run_dir", "unused"]
        config = parse_config(PretrainConfig, argv)
        assert config.d_hidden == getattr(config, width) and config.data == f"data/bookcorpus/{model}-{scale}"
        if scale == "paper":
            sizes = (config.num_layers, config.d_model, config.seq_len, config.batch_size, config.steps)
            assert sizes == (12, 768, 512, 64, 100_000) and config.learning_rate == 5e-5
            assert config.d_hidden == {"bert": 6144, "roberta": 3072}[model]


def test_existing_run_folder_needs_resume_and_the_same_config(pretrain, tmp_path):
    run = tmp_path / "run"
    assert pretrain("bert", "dense_dropblock", run, "--steps", 2).wait() == 0
    assert_one_line(pretrain("bert", "dense_dropblock", run, "--steps", 2), 2, run, "--resume")
    changed = pretrain("bert", "dense_dropblock", run, "--steps", 2, "--resume", "--seed", 2)
    assert_one_line(changed, 2, "seed", 1, 2)
