"""The trainer's --engine: FMoE (or its double where there is no fmoe) trains what PyTorch trains."""

import json
import os
import sys
from pathlib import Path

import pytest
from runs import assert_close_runs, assert_one_line, measured, result

from smoe import fastmoe_available

DOUBLE = Path(__file__).parents[1] / "smoe" / "fmoe_double"


def main() -> None:
    """`python -m transformer_xl.train` for the `start` fixture: with an fmoe, or with none if NO_FMOE is set."""
    from transformer_xl.train import main as train

    if "NO_FMOE" in os.environ:
        fastmoe_available.find_spec = lambda name: None
        return train()
    if fastmoe_available.fastmoe_obstacle() is not None:
        sys.path.insert(0, str(DOUBLE))
    from smoe.fastmoe import FastMoE

    passes = []
    run = FastMoE.forward
    FastMoE.forward = lambda *args: passes.append(None) or run(*args)
    train()
    return print(f"{len(passes)} passes of FMoE")


def test_fastmoe_trains_the_same_model(train, train_argv, start, tmp_path):
    fast, plain = tmp_path / "fast", tmp_path / "plain"
    flags = ["--method", "smoe_dropout", "--log_interval", 1, "--expert_dropout", 0]
    command = start("test_train_engine", *train_argv, *flags, "--run_dir", fast, "--engine", "fastmoe")
    assert command.wait() == 0, command.err
    passes = int(command.out.splitlines()[-1].removesuffix(" passes of FMoE"))
    assert passes > 2 * 20  # two layers, twenty steps, and evaluation
    assert train("smoe_dropout", plain, "--log_interval", 1, "--expert_dropout", 0).wait() == 0
    assert_close_runs(fast, plain)
    assert [result(run)["config"]["engine"] for run in (fast, plain)] == ["fastmoe", "torch"]
    # What was trained on it is evaluated anywhere, and goes on anywhere.
    evaluated = start("transformer_xl.evaluate", fast, "--k", 8, "--json")
    assert evaluated.wait() == 0, evaluated.err
    assert json.loads(evaluated.out)["bpc"]["8"] == pytest.approx(measured(fast)["8"], abs=1e-6)
    (fast / "result.json").unlink()
    resumed = train("smoe_dropout", fast, "--log_interval", 1, "--expert_dropout", 0, "--resume")
    assert resumed.wait() == 0 and result(fast)["config"]["engine"] == "torch", resumed.err


def test_fastmoe_where_there_is_none_is_one_line(start, train_argv, tmp_path):
    run = tmp_path / "run"
    argv = [*train_argv, "--method", "smoe_dropout", "--run_dir", run, "--engine", "fastmoe"]
    command = start("test_train_engine", *argv, env={"NO_FMOE": "1"})
    command.wait()
    assert_one_line(command, 2, "engine is 'fastmoe'", "docs/fastmoe.md")
    assert not run.exists()


@pytest.mark.parametrize(
    ("method", "engine", "words"),
    [("smoe", "warp", ["engine", "warp", "torch"]), ("dense_dropout", "torch", ["engine", "dense_dropout", "leave"])],
)
def test_an_engine_that_says_nothing_is_one_line(method, engine, words, train, tmp_path):
    assert_one_line(train(method, tmp_path / "run", "--engine", engine), 2, *words)


@pytest.mark.distributed
def test_fastmoe_that_one_of_two_has_is_one_line_on_each(start_ranks, train_argv, tmp_path):
    argv = [*train_argv, "--method", "smoe_dropout", "--run_dir", tmp_path / "run", "--engine", "fastmoe"]
    for command in start_ranks(2, "test_train_engine", *argv, env={1: {"NO_FMOE": "1"}}):
        assert_one_line(command, 2, "engine is 'fastmoe'", "docs/fastmoe.md")
