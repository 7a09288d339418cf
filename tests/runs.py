"""What run folders hold, for tests that compare runs."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smoe.train.checkpoint import list_steps
from smoe.train.resume import read_metrics


def weights(run: Path, step: int | None = None):
    step = list_steps(run / "checkpoints")[-1] if step is None else step
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def lines(run: Path):
    """By step: what metrics.jsonl says of training."""
    return {line["step"]: line["train"] for line in read_metrics(run / "metrics.jsonl") if "train" in line}


def losses(run: Path):
    return {step: line["loss"] for step, line in lines(run).items()}


def result(run: Path):
    return json.loads((run / "result.json").read_text())


def measured(run: Path, split: str = "test"):
    """By k: the deciding metric of a finished run."""
    record = result(run)
    return record["metrics"][record["metric"]][split]


def assert_same_weights(run_a: Path, run_b: Path) -> None:
    a, b = weights(run_a), weights(run_b)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_close_runs(run_a: Path, run_b: Path) -> None:
    """Losses to 1e-5, final weights to 1e-4, bits per character to 1e-4."""
    assert losses(run_a) == pytest.approx(losses(run_b), abs=1e-5)
    a, b = weights(run_a), weights(run_b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert measured(run_a) == pytest.approx(measured(run_b), abs=1e-4)


def assert_one_line(command, code: int, *words: object) -> None:
    assert command.wait() == code, command.err
    assert command.err.startswith("error: ") and command.err.count("\n") == 1, command.err
    for word in words:
        assert str(word) in command.err


def wait_for_step(run: Path, step: int, alive, timeout: float = 240) -> None:
    """Returns once metrics.jsonl has a line of this step or a later one; `alive()` must stay true until then."""
    deadline = time.monotonic() + timeout
    while not (seen := losses(run) if (run / "metrics.jsonl").exists() else {}) or max(seen) < step:
        assert alive(), f"ended before step {step}"
        assert time.monotonic() < deadline, f"step {step} not reached in {timeout} s"
        time.sleep(0.002)
