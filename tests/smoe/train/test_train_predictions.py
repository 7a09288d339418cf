"""predictions.jsonl: what the run's best weights said of each example of the last split, at the k of the sweep."""

from __future__ import annotations

import json

import pytest
from toy_task import Toy, toy_config

from smoe import get_top_k
from smoe.control import smoe_layers
from smoe.train.checkpoint import checkpoint_path
from smoe.train.evaluation import measure, sweep
from smoe.train.loop import train
from smoe.train.predictions import Predictions
from smoe.train.processes import Processes
from smoe.train.resume import load_checkpoint, load_weights


class Guesses(Toy):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.predictions = Predictions()

    def passes(self, model, split, device):
        kept = self.predictions.at(model)
        k = get_top_k(model) if smoe_layers(model) else "dense"
        kept["10"] = (f"{split} at {k}", True)
        kept["8"] = (f'"é" {self.first_weight():.8f}', False)
        yield from super().passes(model, split, device)

    def first_weight(self) -> float:
        return self.model.up.weight.flatten()[0].item()

    def result_files(self, processes):
        return self.predictions.files(self.config.sweep_ks(), processes)


def guesses(run_dir, method="smoe_dropout", **fields) -> tuple[Guesses, Processes]:
    processes = Processes()
    config = toy_config(run_dir, method, **fields)
    processes.configure(config)
    return Guesses(config, 0, 1), processes


def lines_of(content: str) -> list[dict]:
    return list(map(json.loads, content.splitlines()))


def test_a_line_has_every_k_of_the_sweep_and_no_other(tmp_path):
    task, processes = guesses(tmp_path, sweep=(4, 1))
    measure(task, "valid", 3, processes)  # as in training, at a k that the sweep leaves out
    sweep(task, processes)
    second, first = lines_of(task.result_files(processes)["predictions.jsonl"])
    assert first == {"id": "10", "1": ["test at 1", 1], "4": ["test at 4", 1]}
    guess = f'"é" {task.first_weight():.8f}'
    assert second == {"id": "8", "1": [guess, 0], "4": [guess, 0]}
    task, processes = guesses(tmp_path, "dense_dropout")
    sweep(task, processes)
    assert lines_of(task.result_files(processes)["predictions.jsonl"])[1] == {"id": "10", "dense": ["test at dense", 1]}


@pytest.mark.parametrize(("seed", "best", "other"), [(1, 12, 8), (2, 12, 4), (3, 8, 4)])
def test_the_lines_are_those_of_the_best_weights(tmp_path, seed, best, other):
    """Not of the best ones at the other k, nor of the last step's."""
    train(Guesses, toy_config(tmp_path, "smoe", seed=seed), Processes())
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["best"]["step"], result["best_at_other_k"][0]["step"]) == (best, other), "else this shows nothing"
    line, _ = lines_of((tmp_path / "predictions.jsonl").read_text())
    weights = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", best), groups=["model"])
    task, processes = guesses(tmp_path, "smoe", seed=seed)
    load_weights(weights, task, processes)
    assert line["1"] == line["4"] == [f'"é" {task.first_weight():.8f}', 0]


def test_a_task_without_predictions_writes_no_file(tmp_path):
    train(Toy, toy_config(tmp_path / "run"), Processes())
    assert (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / "predictions.jsonl").exists()
