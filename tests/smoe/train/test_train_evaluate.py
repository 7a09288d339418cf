"""The command that measures a run finds the run's own task, and takes the flags that the task has."""

from __future__ import annotations

import json

import pytest
from toy_task import Toy, toy_config

from smoe.train.evaluate import evaluation_command
from smoe.train.loop import train
from smoe.train.processes import Processes
from smoe.train.task import Task


class Opposite(Toy):
    """Of the same fields, other labels."""

    name = "opposite"

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.data = {split: (points, 2 - labels) for split, (points, labels) in self.data.items()}


def measure(capsys, run, *tasks) -> dict:
    capsys.readouterr()
    evaluation_command(*tasks, prog="toy", what="a toy", argv=[str(run), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("own", [Toy, Opposite])
def test_of_tasks_with_the_same_fields_it_takes_the_one_that_the_run_names(own, tmp_path, capsys):
    train(own, toy_config(tmp_path, steps=40, learning_rate=0.05), Processes())
    expected = json.loads((tmp_path / "result.json").read_text())["metrics"]["accuracy"]["test"]
    assert min(expected.values()) > 0.6, "else the other labels could have as many right"
    for tasks in ((Toy, Opposite), (Opposite, Toy)):
        assert measure(capsys, tmp_path, *tasks)["accuracy"] == expected
    (other,) = {Toy, Opposite} - {own}
    with pytest.raises(ValueError) as error:
        measure(capsys, tmp_path, other)
    assert str(error.value) == f"run: {tmp_path} is of the task {own.name}; it must be of {other.name}"


def test_a_task_without_a_folder_of_data_has_no_such_flag(tmp_path, capsys):
    train(Toy, toy_config(tmp_path), Processes())
    with pytest.raises(ValueError, match="unrecognized arguments: --data"):
        evaluation_command(Toy, prog="toy", what="a toy", argv=[str(tmp_path), "--data", "folder"])
    with pytest.raises(SystemExit):
        evaluation_command(Toy, prog="toy", what="a toy", argv=["--help"])
    assert "--k" in (said := capsys.readouterr().out) and "--data" not in said


def test_a_task_that_lacks_a_method_is_refused_before_anything_is_written(tmp_path):
    class Unfinished(Toy):
        flops = Task.flops

    with pytest.raises(TypeError, match="Can't instantiate abstract class Unfinished .*flops"):
        train(Unfinished, toy_config(tmp_path / "run"), Processes())
    assert not (tmp_path / "run").exists()
