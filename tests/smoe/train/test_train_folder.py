"""The run folder: starting, continuing and refusing to."""

from __future__ import annotations

import errno
import json

import pytest

from smoe.files import write_atomic
from smoe.run.folder import RunFolder, read_result

CONFIG = {"method": "smoe", "lr": 0.1 + 0.2, "ks": (1, 2), "seed": None, "resume": False, "steps": 5}


def test_start_then_resume(tmp_path):
    run = RunFolder.open(tmp_path / "a" / "run", CONFIG)
    assert run.read_config() == {**CONFIG, "ks": [1, 2]}
    assert run.checkpoints.is_dir()
    RunFolder.open(run.path, {**CONFIG, "resume": True}, resume=True)
    assert run.read_config()["resume"] is True


def test_resume_where_nothing_is_simply_starts(tmp_path):
    assert RunFolder.open(tmp_path / "new", CONFIG, resume=True).config_path.exists()


def test_a_run_is_not_overwritten(tmp_path):
    RunFolder.open(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=f"{tmp_path} already holds a run; --resume continues it"):
        RunFolder.open(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lr": 0.3}, "lr: 0.3 differs from 0.30000000000000004"),
        ({"ks": (1, 4)}, r"ks: \[1, 4\] differs from \[1, 2\]"),
        ({"new": 1}, "new: 1 differs from '\\(absent\\)'"),
    ],
)
def test_resuming_with_another_configuration_names_the_field(tmp_path, change, words):
    before = RunFolder.open(tmp_path, CONFIG).config_path.read_text()
    with pytest.raises(ValueError, match=words):
        RunFolder.open(tmp_path, {**CONFIG, **change}, resume=True)
    assert (tmp_path / "config.yaml").read_text() == before
    run = RunFolder.open(tmp_path, {**CONFIG, **change}, resume=True, may_change=change)
    assert run.read_config() == json.loads(json.dumps({**CONFIG, **change}))


@pytest.mark.parametrize("part", ["metrics.jsonl", "result.json"])
def test_parts_without_a_configuration_are_not_mixed_with_a_new_run(tmp_path, part):
    (tmp_path / part).write_text("{}")
    with pytest.raises(ValueError, match=f"has {part} but no config.yaml"):
        RunFolder.open(tmp_path, CONFIG, resume=True)
    (tmp_path / part).rename(tmp_path / "train.log")  # someone's log is no obstacle
    RunFolder.open(tmp_path, CONFIG)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.open(tmp_path / "f", CONFIG)
    with pytest.raises(ValueError, match="not a run folder"):
        RunFolder.existing(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    run = RunFolder.open(tmp_path / "run", CONFIG, is_main=False)
    run.write_result({"a": 1})
    assert not run.path.exists()


def test_result_round_trip_and_refusals(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="result.json does not exist"):
        run.read_result()
    run.write_result({"bpc": {"test": {"1": 0.1 + 0.2}}})
    assert run.read_result() == read_result(run.result_path) == {"bpc": {"test": {"1": 0.1 + 0.2}}}
    with pytest.raises(ValueError, match="finite"):
        run.write_result({"bpc": float("nan")})
    assert run.read_result()["bpc"]
    for text, words in (("{", "is not JSON"), ("[1]", "holds a list")):
        run.result_path.write_text(text)
        with pytest.raises(ValueError, match=words):
            run.read_result()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("smoe.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
