"""What a result says about where it was made."""

from __future__ import annotations

import json
import platform
import subprocess

import torch

import smoe
from smoe.environment import environment_record, git_state


def test_the_environment_is_plain_data():
    record = environment_record()
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["smoe"] == smoe.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert record["devices"] and record["cpu"]["model"] and record["cpu"]["cores"] >= 1
    assert record["cpu"]["threads"] == torch.get_num_threads()
    assert record["date"].endswith("+00:00")


def test_git_state_tells_clean_from_dirty_and_no_checkout(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for arguments in (["init", "-q"], ["add", "f"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "untracked").write_text("")
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path)["dirty"] is True


def test_a_package_below_an_unrelated_checkout_is_not_part_of_it(tmp_path, monkeypatch):
    """As one that is installed in an environment inside somebody's checkout."""
    package = tmp_path / "site-packages" / "smoe"
    package.mkdir(parents=True)
    (package / "environment.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for arguments in (["init", "-q"], ["add", "f"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr("smoe.environment.__file__", str(package / "environment.py"))
    monkeypatch.setattr("smoe.environment._ROOT", package.parent)
    assert git_state(package.parent) is None
    subprocess.run([*git, "add", "."], check=True)
    assert git_state(package.parent)["dirty"] is True
