"""Checkpoints: exact round trips, and that kills, full disks and damage cost at most the newest one."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import random
import resource
import signal
from pathlib import Path

import numpy
import pytest
import torch

from smoe.run.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    list_steps,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)


def save(folder: Path, step: int, **options) -> None:
    save_checkpoint(folder, step, {"model": {"w": torch.full((64,), float(step))}}, {"step": step}, **options)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "float32": base,
        "shared": base,
        "view": base[1:3],
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.randn(1, 3).expand(5, 3),
        "bfloat16": torch.randn(7).bfloat16(),
        "float64": torch.tensor([0.1, float("nan"), float("-inf"), -0.0], dtype=torch.float64),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.25),
        "bool_scalar": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    state = {"loss": 0.1 + 0.2, "best": float("inf"), "epoch": 3, "done": False, "name": "é", "none": None, "list": [1]}
    save_checkpoint(tmp_path, 7, {"model": tensors, "nothing": {}}, state)
    loaded = load_latest(tmp_path)
    assert (loaded.step, loaded.state, loaded.skipped) == (7, state, [])
    assert loaded.tensors["nothing"] == {} and loaded.tensors["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.detach().contiguous()
        found = loaded.tensors["model"][name]
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        assert (
            found.numpy(force=True).tobytes() == expected.numpy(force=True).tobytes()
            if (expected.dtype != torch.bfloat16)
            else equal_bits(found, expected)
        ), name


def test_only_the_wanted_groups_are_read(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(1)}, "memory-rank0": {"m": torch.ones(1)}}, {})
    assert load_latest(tmp_path, groups=["model", "memory-rank5"]).tensors.keys() == {"model"}


def test_nothing_there_is_none(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing", clean=True) is None
    assert list_steps(tmp_path / "missing") == []


def test_old_ones_go_and_protected_ones_stay(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, protect=[10])
    assert list_steps(tmp_path) == [10, 30, 40]
    save(tmp_path, 50, keep=1)
    assert list_steps(tmp_path) == [50]


def test_saving_after_an_earlier_step_was_resumed_drops_the_abandoned_future(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 15)
    assert list_steps(tmp_path) == [10, 15]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 10)
    save_checkpoint(tmp_path, 10, {"model": {"w": torch.zeros(1)}}, {"second": True})
    assert load_latest(tmp_path).state == {"second": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def edit_state(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


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
    damage_only = tmp_path / "step-00000010" / name
    damage_only.unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint.*step-00000020.*step-00000010"):
        load_latest(tmp_path)


def test_a_replacement_cut_off_between_its_renames_is_still_found(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / ".old-step-00000010")
    assert load_latest(tmp_path).step == 10
    assert load_latest(tmp_path, clean=True).path.name == "step-00000010"


def test_leftovers_are_cleaned_only_when_asked_or_at_the_next_save(tmp_path):
    save(tmp_path, 10)
    leftover = tmp_path / ".tmp-step-00000015"
    for clean in (lambda: load_latest(tmp_path, clean=True), lambda: save(tmp_path, 20)):
        leftover.mkdir()
        (leftover / "model.safetensors").write_text("half")
        assert load_latest(tmp_path).step == 10 and leftover.exists()
        clean()
        assert not leftover.exists()


def test_several_processes_write_into_one_checkpoint(tmp_path):
    writers = [CheckpointWriter(tmp_path, 5) for _ in range(3)]
    writers[0].begin()
    for rank, writer in enumerate(writers):
        writer.write(f"rng-rank{rank}", {"x": torch.tensor(rank)})
        assert load_latest(tmp_path) is None  # nothing shows before it is sealed
    writers[0].seal({"a": 1}, expect=[f"rng-rank{rank}" for rank in range(3)])
    loaded = load_latest(tmp_path)
    assert [loaded.tensors[f"rng-rank{rank}"]["x"].item() for rank in range(3)] == [0, 1, 2]


def test_a_process_that_did_not_write_is_noticed(tmp_path):
    writer = CheckpointWriter(tmp_path, 5)
    writer.begin()
    writer.write("rng-rank0", {})
    with pytest.raises(CheckpointError, match="rng-rank1 not written"):
        writer.seal({}, expect=["rng-rank0", "rng-rank1"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", [{"k": {1: 2}}, {"x": torch.ones(1)}, {"x": object()}])
def test_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(AssertionError, match=r"state\."):
        save_checkpoint(tmp_path, 1, {}, state)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 10)
    monkeypatch.setattr("smoe.run.checkpoint._independent", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("size", [200_000, 4_000])  # too small for the tensors, then for state.json alone
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, size):
    """A limit on file size gives the same kind of error from the same calls as a full disk."""
    save(tmp_path, 10)
    big = torch.randn(100_000) if size == 200_000 else torch.randn(8)
    state = {} if size == 200_000 else {"text": "x" * 10_000}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path, 20, {"model": {"w": big}}, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    message = str(caught.value)
    assert "step-00000020" in message and "File too large" in message and "last one there is step-00000010" in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert load_latest(tmp_path).step == 10


def die_at_call(monkeypatch, target: str, number: int) -> None:
    module, _, name = target.rpartition(".")
    real, calls = getattr(pkgutil.resolve_name(module), name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    monkeypatch.setattr(target, call)


@pytest.mark.parametrize(
    "target, number, step, survivor",
    [
        ("smoe.run.checkpoint.fsync_path", 1, 20, 10),  # the first file written
        ("smoe.run.checkpoint.fsync_path", 3, 20, 10),  # state.json written
        ("pathlib.Path.rename", 1, 20, 10),  # all written, not yet in place
        ("smoe.run.checkpoint.fsync_path", 5, 20, 20),  # in place
        ("smoe.run.checkpoint.shutil.rmtree", 1, 30, 30),  # the oldest about to go
        ("pathlib.Path.rename", 2, 10, 10),  # between the two renames of a replacement
    ],
)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, target, number, step, survivor):
    save(tmp_path, 10)
    if step == 30:
        save(tmp_path, 20)
    child = os.fork()
    if child == 0:
        try:
            die_at_call(monkeypatch, target, number)
            save_checkpoint(tmp_path, step, {"model": {"w": torch.full((8,), float(step))}, "optimizer": {}}, {})
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    loaded = load_latest(tmp_path, clean=True)
    assert (loaded.step, loaded.tensors["model"]["w"][0]) == (survivor, survivor)
    assert loaded.skipped == [] and all(path.name.startswith("step-") for path in tmp_path.iterdir())
    save(tmp_path, 40)
    assert load_latest(tmp_path).step == 40


def test_state_json_lists_size_and_hash_of_every_file(tmp_path):
    save(tmp_path, 1)
    content = json.loads((tmp_path / "step-00000001" / "state.json").read_text())["content"]
    entry = content["files"]["model.safetensors"]
    assert entry["size"] == (tmp_path / "step-00000001" / "model.safetensors").stat().st_size
    assert len(entry["sha256"]) == 64


def test_generators_are_untouched_by_saving(tmp_path):
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    expected = torch.rand(3), random.random(), numpy.random.rand()
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    save(tmp_path, 1)
    assert torch.rand(3).equal(expected[0]) and (random.random(), numpy.random.rand()) == expected[1:]
