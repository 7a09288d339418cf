"""The trainer: run folder, resume bit for bit, several processes, and what it says when something is wrong."""

import json
import math
import resource
import shutil
import signal
import time
from functools import partial

import ablations
import interruptions
import pytest
import torch
from runs import assert_one_line, assert_same_weights, lines, losses, result, weights

from smoe import METHODS
from smoe.train.checkpoint import save_checkpoint
from smoe.train.evaluate import read_run
from smoe.train.learning_rate import learning_rate_at
from smoe.train.resume import load_checkpoint, load_latest
from transformer_xl.config import LanguageModelConfig
from transformer_xl.train import LanguageModel


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_full_run_folder(method, train, tmp_path, data_dir):
    run = tmp_path / "run"
    command = train(method, run)
    assert command.wait() == 0, command.err
    record = result(run)
    assert record["method"] == method and record["scale"] == "smoke" and record["seed"] == 1
    assert (record["task"], record["metric"]) == ("language_model", "bpc")
    assert record["dataset"]["sha256"] == json.loads((data_dir / "meta.json").read_text())["sha256"]
    keys = {"1", "2", "4", "8", "12", "16"} if METHODS[method].routed else {"dense"}
    for split in ("valid", "test"):
        assert record["metrics"]["bpc"][split].keys() == keys
        assert all(3 < bpc < 8.5 for bpc in record["metrics"]["bpc"][split].values())
    assert record["metrics"]["bpc"]["n"] == {"valid": 2048, "test": 2048}
    assert record["metrics"]["bpc"]["direction"] == "lower"
    assert record["parameters"]["total"] > 0 and record["tokens_per_step"] == 4 * 32
    assert record["flops"].keys() == keys
    assert record["environment"]["versions"]["torch"] == torch.__version__
    measured = losses(run)
    assert list(measured) == [5, 10, 15, 20]
    assert measured[20] < measured[5], "nothing was learned"
    parts = lines(run)[5]
    extra = {"thor": "consistency", "smoe": "balance", "dense_concrete_dropout": "concrete"}.get(method)
    assert extra is None or math.isfinite(parts[extra])
    assert any((run / "tensorboard").iterdir())


def test_k_follows_the_schedule_and_the_router_stays_fixed(train, tmp_path):
    run = tmp_path / "run"
    assert train("smoe_dropout", run, "--log_interval", 1, "--save_interval", 5).wait() == 0
    assert [line["k"] for line in lines(run).values()] == [round(8 * step / 20) + 8 for step in range(20)]
    early, late = weights(run, 15), weights(run, 20)
    routers = [name for name in early if ".router." in name]
    assert len(routers) == 4
    assert all(torch.equal(early[name], late[name]) for name in routers)
    assert not torch.equal(early["layers.0.mlp.experts.up"], late["layers.0.mlp.experts.up"])


def test_learning_rate_is_half_a_cosine_after_its_warm_up():
    config = {"steps": 1000, "learning_rate": 2.0, "warmup_steps": 10, "decay": "cosine"}
    assert learning_rate_at(0, **config) == pytest.approx(0.2)
    assert learning_rate_at(500, **config) == pytest.approx(1.0)
    assert learning_rate_at(999, **config) == pytest.approx(2 * math.cos(math.pi * 999 / 2000) ** 2)


def task_of(run):
    return LanguageModel(read_run(run, LanguageModelConfig, "a Transformer-XL", "last")[0], 0, 1)


@pytest.mark.parametrize("mode", ["random", "random_per_layer"])
def test_a_random_schedule_is_logged_for_every_layer(mode, train, tmp_path):
    ablations.check_random_schedule(train, task_of, tmp_path, mode)


def test_only_some_layers_may_have_experts(train, tmp_path):
    ablations.check_only_later_layers(train, task_of, tmp_path, tokens=4 * 32)


def test_thor_without_its_consistency_loss_makes_one_pass(train, tmp_path):
    ablations.check_thor_with_one_pass(train, tmp_path)


def test_a_run_killed_five_times_ends_with_the_same_bits(train, tmp_path):
    interruptions.check_kills(partial(train, "smoe_dropout"), tmp_path, kills=5, steps=40, log_interval=2)


def test_sigterm_writes_a_checkpoint_that_resume_goes_on_from(train, tmp_path):
    interruptions.check_sigterm(partial(train, "thor"), tmp_path, ("--log_interval", 1), stop_at=7, steps=40)


def test_finished_run_is_not_trained_again(train, tmp_path):
    run = tmp_path / "run"
    assert train("smoe_dropout", run).wait() == 0
    before = (run / "result.json").read_bytes()
    again = train("smoe_dropout", run, "--resume")
    assert again.wait() == 0 and "is finished" in again.out
    assert (run / "result.json").read_bytes() == before


# ---- bad input: one clear line, an exit code, nothing half-written ------------------------------------------------
@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        ("smoe_dropout", ["--k_max", "17"], ["k_max", "17", "16"]),
        ("smoe_dropout", ["--k_min", "0"], ["k_min", "0", "1"]),
        ("smoe_dropout", ["--d_hidden", "100"], ["d_hidden", "100", "96", "112"]),
        ("smoe_dropuot", [], ["method", "smoe_dropuot", "smoe_dropout"]),
        ("smoe_dropout", ["--scale", "huge"], ["scale", "huge", "paper", "cpu", "smoke"]),
        ("smoe_dropout", ["--steps", "many"], ["steps", "many"]),
        ("smoe_dropout", ["--stesp", "10"], ["stesp", "steps"]),
        ("smoe_dropout", ["--output_scale", "half"], ["output_scale", "half", "num_experts"]),
        ("smoe_dropout", ["--sweep", "[0]"], ["sweep", "0"]),
        ("smoe_dropout", ["--data", "/nowhere"], ["/nowhere", "prepare.py"]),
        ("smoe_dropout", ["--batch_size", "100000"], ["batch", "100000"]),
        ("smoe_dropout", ["--eval_batch_size", "100000"], ["batch", "100000"]),
        ("smoe_dropout", ["--eval_tokens", "1"], ["eval_tokens is 1", "eval_batch_size"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(method, flags, words, train, tmp_path):
    run = tmp_path / "run"
    assert_one_line(train(method, run, *flags), 2, *words)
    assert not run.exists()


def test_truncated_data_is_named(train, tmp_path, data_dir):
    for file in data_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "valid.bin").write_bytes(b"short")
    assert_one_line(train("smoe_dropout", tmp_path / "run", "--data", tmp_path), 2, "valid.bin", "5 bytes", "SHA-256")
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_what_its_record_says(train, tmp_path, data_dir):
    for file in data_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "test.bin").write_bytes((data_dir / "valid.bin").read_bytes())
    assert_one_line(train("smoe_dropout", tmp_path / "run", "--data", tmp_path), 2, "test.bin", "SHA-256", "--force")
    assert not (tmp_path / "run").exists()


def test_a_model_too_large_for_the_machine_leaves_nothing(train, tmp_path):
    assert_one_line(train("dense_dropout", tmp_path / "run", "--d_hidden", 10**13), 1, "out of memory")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_more_processes_goes_on_with_generators_drawn_anew(train, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    flags = ("--steps", 4, "--eval_interval", 2)
    assert train("smoe_dropout", run, *flags).wait() == 0
    (run / "result.json").unlink()
    first = load_checkpoint(run / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "checkpoints")
    save_checkpoint(run / "checkpoints", 2, first.tensors, {**first.state, "world_size": 2})
    shutil.copytree(run, again)
    for folder in (run, again):
        command = train("smoe_dropout", folder, *flags, "--resume")
        assert command.wait() == 0, command.err
        assert "the checkpoint is of 2 processes, this run has 1" in command.out
    assert_same_weights(run, again)


def test_interrupted_in_the_final_sweep_it_ends_at_once_and_can_go_on(train, tmp_path):
    run = tmp_path / "run"
    command = train(
        "dense_dropout",
        run,
        "--steps",
        2,
        "--eval_tokens",
        5000,
        "--eval_tgt_len",
        1,
        "--eval_batch_size",
        2,
        wait=False,
    )
    while not (run / "checkpoints" / "step-00000002").exists():
        assert command.process.is_alive(), command.err
        time.sleep(0.002)
    time.sleep(0.2)
    command.kill(signal.SIGINT)
    assert_one_line(command, 130, "interrupted")
    assert not (run / "result.json").exists()


def test_existing_run_folder_needs_resume_and_the_same_config(train, tmp_path):
    run = tmp_path / "run"
    assert train("smoe_dropout", run).wait() == 0
    assert_one_line(train("smoe_dropout", run), 2, run, "--resume")
    assert_one_line(train("smoe_dropout", run, "--resume", "--seed", 2), 2, "seed", 1, 2)


def test_corrupted_newest_checkpoint_falls_back_to_the_one_before(train, tmp_path):
    alone, damaged = tmp_path / "alone", tmp_path / "damaged"
    for run in (alone, damaged):
        assert train("smoe_dropout", run, "--eval_interval", 5).wait() == 0
    (damaged / "result.json").unlink()
    file = damaged / "checkpoints" / "step-00000020" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    command = train("smoe_dropout", damaged, "--eval_interval", 5, "--resume")
    assert command.wait() == 0, command.err
    assert "step-00000020 is damaged" in command.err and "going on from step-00000015" in command.err
    assert_same_weights(alone, damaged)


def test_full_disk_keeps_the_last_checkpoint(start, train, tmp_path):
    run = tmp_path / "run"
    assert (
        train("smoe_dropout", run, "--steps", 40, "--eval_interval", 10, "--save_interval", 10, wait=True).wait() == 0
    )
    size = max(file.stat().st_size for file in run.glob("checkpoints/*/*"))
    # The same run again where no file may grow past half of what a checkpoint's largest one needs.
    small = tmp_path / "small"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    first = train("smoe_dropout", small, "--steps", 40, "--eval_interval", 10, "--log_interval", 1, wait=False)
    while not (small / "checkpoints" / "step-00000010").exists():
        assert first.process.is_alive(), first.err
        time.sleep(0.002)
    resource.prlimit(first.process.pid, resource.RLIMIT_FSIZE, (size // 2, hard))
    assert_one_line(first, 1, "checkpoint")
    kept = load_latest(small / "checkpoints")
    assert kept is not None and kept.step >= 10 and not kept.skipped
    assert not list((small / "checkpoints").glob(".tmp*"))
    again = train("smoe_dropout", small, "--steps", 40, "--eval_interval", 10, "--log_interval", 1, "--resume")
    assert again.wait() == 0, again.err
    assert_same_weights(run, small)


def test_non_finite_loss_stops_before_the_optimizer_step(train, tmp_path):
    run = tmp_path / "run"
    # A learning rate that makes weights whose squares overflow, though they are finite themselves.
    command = train("smoe_dropout", run, "--learning_rate", "1e25", "--save_interval", 1, "--log_interval", 1)
    assert_one_line(command, 1, "not finite at step", "segment", "k = ")
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    assert not (run / "result.json").exists()
