"""From a run folder back to a run: damage costs at most the newest checkpoint, and metrics have each step once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from smoe.errors import CheckpointError
from smoe.train.checkpoint import list_steps, save_checkpoint
from smoe.train.processes import Processes
from smoe.train.resume import (
    check_same_config,
    drop_later_lines,
    load_checkpoint,
    load_latest,
    newest_checkpoint,
    read_metrics,
)


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, step, {"model": {"w": torch.full((64,), float(step))}}, {"step": step})


def test_only_the_wanted_groups_are_read(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(1)}, "task": {"m": torch.ones(1)}}, {})
    assert load_latest(tmp_path, groups=["model", "rng-rank5"]).tensors.keys() == {"model"}
    assert load_checkpoint(tmp_path / "step-00000001").tensors.keys() == {"model", "task"}


def test_nothing_there_is_none(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert load_latest(folder) is None
        assert newest_checkpoint(folder, Processes()) is None
        assert list_steps(folder) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def edit_state(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


def write_format(path: Path) -> None:
    from smoe.train.checkpoint import hash_json

    content = {**json.loads(path.read_text())["content"], "format": 99}
    path.write_text(json.dumps({"content": content, "sha256": hash_json(content)}))


DAMAGE = {
    "flipped bit": ("model.safetensors", flip, "model.safetensors has changed"),
    "truncated": ("model.safetensors", lambda p: os.truncate(p, 100), "has 100 bytes of"),
    "emptied": ("model.safetensors", lambda p: os.truncate(p, 0), "has 0 bytes of"),
    "deleted": ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    "no state": ("state.json", Path.unlink, "state.json is missing"),
    "broken JSON": ("state.json", lambda p: os.truncate(p, 20), "cannot be read"),
    "not an object": ("state.json", lambda p: p.write_text("[1]"), "cannot be read"),
    "not text": ("state.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "edited state": ("state.json", edit_state, "state.json has changed"),
    "another version's": ("state.json", write_format, "format '99', this version reads 2"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_and_reported(tmp_path, kind):
    name, damage, reason = DAMAGE[kind]
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path / "step-00000020" / name)
    loaded = load_latest(tmp_path)
    assert loaded.step == 10 and loaded.tensors["model"]["w"][0] == 10
    ((path, why),) = loaded.skipped
    assert path.name == "step-00000020" and reason in why and "\n" not in why
    with pytest.raises(CheckpointError, match=r"step-00000020"):
        load_checkpoint(path)
    (tmp_path / "step-00000010" / name).unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint.*step-00000020.*step-00000010"):
        load_latest(tmp_path)


def test_a_run_that_goes_on_says_and_removes_what_is_damaged(tmp_path, capsys):
    for step in (10, 20):
        save(tmp_path, step)
    flip(tmp_path / "step-00000020" / "model.safetensors")
    assert newest_checkpoint(tmp_path, Processes()).step == 10
    assert list_steps(tmp_path) == [10]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("warning: step-00000020 is damaged (") and "going on from step-00000010" in error
    # A reader removes nothing; and where nothing whole is left, nothing is removed either.
    flip(tmp_path / "step-00000010" / "model.safetensors")
    for read in (load_latest, lambda folder: newest_checkpoint(folder, Processes())):
        with pytest.raises(CheckpointError, match="no usable checkpoint"):
            read(tmp_path)
        assert list_steps(tmp_path) == [10]


def test_leftovers_are_cleaned_by_a_run_that_goes_on_or_saves_and_by_no_reader(tmp_path):
    save(tmp_path, 10)
    leftover = tmp_path / ".tmp-step-00000015"
    for clean in (lambda: newest_checkpoint(tmp_path, Processes()), lambda: save(tmp_path, 20)):
        leftover.mkdir()
        (leftover / "model.safetensors").write_text("half")
        assert load_latest(tmp_path).step == 10 and leftover.exists()
        clean()
        assert not leftover.exists()


def test_a_configuration_that_differs_names_field_values_and_file(tmp_path):
    recorded, file = {"seed": 1, "lr": 0.1, "data": "a"}, tmp_path / "config.yaml"
    check_same_config(recorded, {"seed": 1, "lr": 0.1, "data": "b", "new": 3}, ("data", "new"), file)
    for given, words in (
        ({**recorded, "seed": 2}, f"seed: 2 differs from 1 in {file}; resume with the recorded one"),
        ({**recorded, "new": 3}, "new: 3 differs from '(absent)'"),
        ({"seed": 1, "data": "a"}, "lr: '(absent)' differs from 0.1"),
    ):
        with pytest.raises(ValueError) as caught:
            check_same_config(recorded, given, ("data",), file)
        assert words in str(caught.value) and "\n" not in str(caught.value)


# ---- metrics.jsonl


def write(path: Path, steps: list[int]) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in steps))


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


@pytest.mark.parametrize("step, kept", [(2, [1, 2]), (9, [1, 2, 3, 4]), (0, [])])
def test_lines_of_later_steps_are_dropped(tmp_path, step, kept):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    drop_later_lines(path, step)
    assert steps(path) == kept
    assert [line["loss"] for line in read_metrics(path)] == [step / 3 for step in kept]  # exact


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 3, "note": "é'.encode()[:-1], b"\xff", "3", "[]"])
def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with open(path, "ab") as file:
        file.write(half if isinstance(half, bytes) else half.encode())
    assert steps(path) == [1, 2]
    drop_later_lines(path, 9)
    with open(path, "a") as file:
        file.write('{"step": 3}\n')
    assert steps(path) == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_metrics_that_are_not_there_are_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    drop_later_lines(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_file_in_which_nothing_changes_is_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    before = path.stat().st_ino
    drop_later_lines(path, 2)
    assert path.stat().st_ino == before
