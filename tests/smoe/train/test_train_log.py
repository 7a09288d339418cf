"""What a training says: lines that survive crashes and resumes, the k of every layer, TensorBoard, the first lines."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from toy_task import Toy, toy, toy_config

from smoe.methods import MethodLoss
from smoe.metrics import Metric
from smoe.train.evaluation import Measured
from smoe.train.folder import RunFolder
from smoe.train.log import Log, at_k, one_or_all, print_header
from smoe.train.processes import Processes
from smoe.train.resume import Checkpoint, read_metrics


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch, request):
    if "board" not in request.node.name:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError


def loss_of(value: float, **parts: float) -> MethodLoss:
    value = torch.tensor(value, dtype=torch.float64)
    return MethodLoss(value * 2, value, {name: torch.tensor(part) for name, part in parts.items()}, None)


def open_log(folder, processes: Processes | None = None, step: int | None = None, nats=(0.0, 0.0), task=None) -> Log:
    """``step``: that of the checkpoint from which the run goes on."""
    only = toy(toy_config(folder))
    checkpoint = None if step is None else Checkpoint(step, {}, {"nats": list(nats)}, folder)
    return Log(task or only[0], RunFolder(folder), processes or only[1], checkpoint)


def write(folder, steps, step: int | None = None) -> None:
    log = open_log(folder, step=step)
    for i in steps:
        log.evaluation(i, "valid", Measured({"accuracy": i / 3}, 1), 4, 0.5)
    log.close()


def lines(folder) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl")


def steps(folder) -> list[int]:
    return [line["step"] for line in lines(folder)]


def test_lines_are_on_the_disk_at_once_and_exact(tmp_path):
    log = open_log(tmp_path)
    values = {"accuracy": 0.1 + 0.2, "cross_entropy": float("nan"), "worst": float("inf")}
    log.evaluation(1, "valid", Measured(values, 3), 4, 1.5)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line == {
        "step": 1,
        "valid": {"accuracy": 0.1 + 0.2, "cross_entropy": None, "worst": None},
        "seconds": 1.5,
    }
    log.close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("step, kept", [(None, []), (2, [1, 2]), (9, [1, 2, 3, 4])])
def test_resuming_drops_what_will_be_written_again(tmp_path, step, kept):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [5], step)
    assert steps(tmp_path) == [*kept, 5]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, [3], step=2)
    assert steps(tmp_path) == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


class Other(Processes):
    """One that is not the main process."""

    rank = 1


def test_other_processes_log_nothing(tmp_path, capsys):
    other = Other()
    other.configure(toy_config(tmp_path))
    log = open_log(tmp_path / "run", other)
    log.evaluation(1, "valid", Measured({"accuracy": 1.0}, 3), 2, 0.5)
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_line_has_the_mean_loss_since_the_last_one(tmp_path):
    log = open_log(tmp_path)
    for value in (1.0, 2.0, 6.0):
        log.count(loss_of(value))
    log.train(3, loss_of(6.0, balance=0.5), [2, 2], 0.01, torch.tensor(0.25), 7.0)
    log.count(loss_of(5.0))
    log.train(4, loss_of(5.0), [2, 3], 0.02, torch.tensor(0.5), 8.0)
    first, second = lines(tmp_path)
    speed = first["train"].pop("tokens_per_second")
    assert first == {
        "step": 3,
        "train": {"loss": 3.0, "lr": 0.01, "grad_norm": 0.25, "k": 2, "balance": 0.5},
        "seconds": 7.0,
    }
    assert speed > 0 and (second["train"]["loss"], second["train"]["k"]) == (5.0, [2, 3])


def test_the_mean_survives_a_resume(tmp_path):
    """Four steps with a loss of 1.5 each lie between the last line and the checkpoint."""
    log = open_log(tmp_path, step=4, nats=(6.0, 4.0))
    log.count(loss_of(4.0))
    assert log.nats.tolist() == [10.0, 5.0]
    log.train(5, loss_of(4.0), [], 0.01, torch.tensor(1.0), 1.0)
    assert lines(tmp_path)[-1]["train"]["loss"] == 2.0 and lines(tmp_path)[-1]["train"]["k"] is None


def test_speed_counts_the_tokens_of_the_steps_since_the_last_interval(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("smoe.train.log.time.perf_counter", lambda: now[0])
    log = open_log(tmp_path)
    for _ in range(3):
        log.count(loss_of(1.0))
    now[0] += 50  # an evaluation
    log.new_interval()
    for _ in range(2):
        log.count(loss_of(1.0))
    now[0] += 4
    log.train(5, loss_of(1.0), [], 0.1, torch.tensor(1.0), 1.0)
    assert lines(tmp_path)[0]["train"]["tokens_per_second"] == 2 * 20 / 4


def test_the_training_loss_is_also_in_the_unit_of_a_metric_that_is_the_mean_loss_in_bits(tmp_path):
    class Bits(Toy):
        metrics = (Metric("bits", "Bits", "bits per point", "lower", nats=True),)

    config = toy_config(tmp_path)
    log = open_log(tmp_path, task=Bits(config, 0, 1))
    log.count(loss_of(3 * math.log(2)))
    log.train(1, loss_of(1.0), [], 0.1, torch.tensor(1.0), 1.0)
    assert lines(tmp_path)[0]["train"]["bits"] == pytest.approx(3, abs=1e-12)


def test_board_gets_every_number_and_forgets_abandoned_steps(tmp_path, monkeypatch):
    # TensorBoard reads files in the order of their names: the second, and in it a counter, of which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for step, first in ((None, 1), (2, 3)):
        log = open_log(tmp_path, step=step)
        for i in range(first, 5):
            log.count(loss_of(i + 10.0 * first))
            log.train(i, loss_of(1.0, balance=2.0), [1, i], 0.5, torch.tensor(float("nan")), 9.0)
            log.evaluation(i, "valid", Measured({"accuracy": 0.25}, 4), 4, 9.0)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    train = {"loss", "lr", "k", "k/0", "k/1", "tokens_per_second", "balance"}  # the norm, NaN, is left out
    assert set(events.Tags()["scalars"]) == {f"train/{tag}" for tag in train} | {"valid/accuracy", "seconds"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 11), (2, 12), (3, 33), (4, 34)]
    assert [(e.step, e.value) for e in events.Scalars("train/k")] == [(1, 1)]  # where the layers agree
    assert [(e.step, e.value) for e in events.Scalars("train/k/1")] == [(2, 2), (3, 3), (4, 4)]


def test_k_in_words_and_numbers():
    assert [one_or_all(ks) for ks in ([], [3], [3, 3], [3, 4])] == [None, 3, 3, [3, 4]]
    assert [at_k(k) for k in (None, 3, [3, 4])] == ["", " at k = 3", " at k = 3, 4"]


def test_the_first_lines_say_what_is_about_to_run(tmp_path, capsys):
    config = toy_config(tmp_path, layers="later", schedule="cosine", scale="smoke", scale_reason="asked for", seed=7)
    task, processes = toy(config)
    task.notes = lambda: ["a note"]
    print_header(task, processes)
    dense, experts = 2 * 8 * 16 + 16 + 8, 2 * 8 * 16 + 16 + 4 * 8
    size = (2 * 8 + 8) + dense + experts + (8 * 3 + 3)
    assert capsys.readouterr().out.splitlines() == [
        f"classifier, SMoE-Dropout, 4 experts, k = 2..4 (cosine) in layers 1, seed 7, run folder {tmp_path}",
        f"scale smoke (asked for): {size} parameters, 12 steps of 20 points, 1 x cpu, precision fp32",
        "a note",
    ]
    task.config = dataclasses.replace(toy_config(tmp_path, "thor"), expert_parallel=2, fsdp=True)
    print_header(task, processes)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert "THOR, 4 experts, k = 2..2 (constant), seed 1" in first
    assert "1 x cpu (experts over 2) (sharded), precision" in second
    task.config = toy_config(tmp_path, "dense_dropout")
    print_header(task, processes)
    assert "classifier, Dense w. Dropout, seed 1" in capsys.readouterr().out


def test_the_first_lines_are_there_at_once_in_a_pipe_too(tmp_path, monkeypatch):
    task, processes = toy(toy_config(tmp_path))
    task.notes = lambda: ["the last one"]
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    print_header(task, processes)
    assert pipe.getvalue().endswith(b"the last one\n")
    monkeypatch.undo()
