"""Metrics: lines that survive crashes and resumes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from smoe.run.folder import RunFolder
from smoe.run.metrics import MetricsLogger, read_metrics


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch, request):
    if "board" not in request.node.name:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError


def write(folder, steps, resume_step=None) -> None:
    with MetricsLogger(folder, resume_step) as metrics:
        for step in steps:
            metrics.log(step, {"loss": step / 3})


def steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_lines_are_on_the_disk_at_once_and_exact(tmp_path):
    metrics = MetricsLogger(RunFolder(tmp_path))
    metrics.log(1, {"loss": 0.1 + 0.2, "bpc": {"1": torch.tensor(1.5)}, "bad": float("nan"), "note": "x"})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": 0.1 + 0.2, "bpc": {"1": 1.5}, "bad": None, "note": "x"}
    metrics.close()
    metrics.log(2, {})
    assert steps(tmp_path) == [1] and not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("resume_step, kept", [(None, [1, 2, 3, 4]), (2, [1, 2]), (9, [1, 2, 3, 4]), (-1, [])])
def test_resuming_drops_what_will_be_written_again(tmp_path, resume_step, kept):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [5], resume_step)
    assert steps(tmp_path) == [*kept, 5]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, [3])
    assert steps(tmp_path) == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_other_processes_log_nothing(tmp_path):
    write(RunFolder(tmp_path / "run", is_main=False), [1])
    assert not (tmp_path / "run").exists()


def test_board_gets_every_number_and_forgets_abandoned_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, first in ((None, 1), (2, 3)):
        with MetricsLogger(tmp_path, resume_step) as metrics:
            for step in range(first, 5):
                metrics.log(step, {"loss": step + 10 * first, "bpc": {"1": 2.0}, "note": "text", "flag": True})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "bpc/1"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 11), (2, 12), (3, 33), (4, 34)]
