"""Checkpoints: exact round trips, and that kills and full disks cost at most the newest one."""

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
from ranks import run_ranks

from smoe.errors import CheckpointError
from smoe.train.checkpoint import list_steps, save_checkpoint
from smoe.train.distributed import DistributedProcesses
from smoe.train.processes import Processes
from smoe.train.resume import load_latest, newest_checkpoint


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
        "float64": torch.tensor([0.1, 1.7e308, 5e-324, -0.0], dtype=torch.float64),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", ["model", "optimizer"])
def test_numbers_that_are_not_finite_never_become_the_newest_checkpoint(tmp_path, value, group):
    save(tmp_path, 10)
    tensors = {"model": {"w": torch.ones(3)}, "optimizer": {"m": torch.ones(2, 2)}}
    next(iter(tensors[group].values())).view(-1)[-1] = value
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path, 20, tensors, {})
    assert str(error.value) == (
        f"checkpoint step-00000020 in {tmp_path}: {group} has numbers that are not finite while writing tensors; "
        "the last one there is step-00000010"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"] and load_latest(tmp_path).step == 10


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 10)
    save_checkpoint(tmp_path, 10, {"model": {"w": torch.zeros(1)}}, {"second": True})
    assert load_latest(tmp_path).state == {"second": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def _save_on(rank: int, folder: str, tensors: list[dict]) -> str:
    processes = DistributedProcesses(60)
    try:
        save_checkpoint(Path(folder), 5, tensors[rank], {"of": rank}, processes=processes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert list_steps(Path(folder)) == [5], "a process goes on before the checkpoint is in place"
    return ""


@pytest.mark.distributed
def test_several_processes_write_into_one_checkpoint(tmp_path):
    tensors = [{f"rng-rank{rank}": {"x": torch.tensor(rank)}} for rank in range(3)]
    tensors[0]["model"] = {"w": torch.ones(2)}
    assert run_ranks(_save_on, 3, str(tmp_path / "checkpoints"), tensors) == [""] * 3
    loaded = load_latest(tmp_path / "checkpoints")
    assert loaded.state == {"of": 0}
    assert loaded.tensors.keys() == {"model", "rng-rank0", "rng-rank1", "rng-rank2"}
    assert [loaded.tensors[f"rng-rank{rank}"]["x"].item() for rank in range(3)] == [0, 1, 2]


@pytest.mark.distributed
def test_a_process_that_cannot_write_fails_all(tmp_path):
    save(tmp_path, 1)
    tensors = [{"rng-rank0": {"x": torch.ones(1)}}, {"no-such-folder/rng-rank1": {"x": torch.ones(1)}}]
    main, other = run_ranks(_save_on, 2, str(tmp_path), tensors)
    for error, who in ((main, "rank 1: "), (other, "")):
        assert error.startswith(f"CheckpointError: checkpoint step-00000005 in {tmp_path}: {who}")
        assert "No such file" in error and error.endswith("while writing tensors; the last one there is step-00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_shows_under_the_name_before_all_is_written(tmp_path, monkeypatch):
    shown = []
    real = pkgutil.resolve_name("smoe.train.checkpoint.fsync_path")
    monkeypatch.setattr("smoe.train.checkpoint.fsync_path", lambda p: shown.append(list_steps(tmp_path)) or real(p))
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(2)}, "task": {}}, {})
    assert shown == [[]] * 4 + [[5]]  # two groups, state.json, their folder; then the folder of all checkpoints


@pytest.mark.parametrize("state", [{"k": {1: 2}}, {"k": (1, 2)}, {"x": torch.ones(1)}, {"x": object()}])
def test_state_that_json_would_change_is_refused(tmp_path, state):
    save(tmp_path, 10)
    with pytest.raises((AssertionError, TypeError)):
        save_checkpoint(tmp_path, 20, {}, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 10)
    monkeypatch.setattr("smoe.train.checkpoint.fsync_path", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
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


def save_and_die(monkeypatch, folder: Path, step: int, target: str, number: int) -> None:
    """Saves in a child that is killed at a call of ``target``."""
    child = os.fork()
    if child == 0:
        try:
            die_at_call(monkeypatch, target, number)
            save_checkpoint(folder, step, {"model": {"w": torch.full((8,), float(step))}, "optimizer": {}}, {})
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize(
    "target, number, step, survivor",
    [
        ("smoe.train.checkpoint.fsync_path", 1, 20, 10),  # the first file written
        ("smoe.train.checkpoint.fsync_path", 3, 20, 10),  # state.json written
        ("pathlib.Path.rename", 1, 20, 10),  # all written, not yet in place
        ("smoe.train.checkpoint.fsync_path", 5, 20, 20),  # in place
        ("smoe.train.checkpoint.shutil.rmtree", 2, 30, 30),  # the oldest about to go
        ("os.unlink", 2, 30, 30),  # the oldest half gone
    ],
)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, target, number, step, survivor):
    save(tmp_path, 10)
    if step == 30:
        save(tmp_path, 20)
    save_and_die(monkeypatch, tmp_path, step, target, number)
    loaded = newest_checkpoint(tmp_path, Processes())
    assert (loaded.step, loaded.tensors["model"]["w"][0]) == (survivor, survivor)
    assert loaded.skipped == [] and all(path.name.startswith("step-") for path in tmp_path.iterdir())
    save(tmp_path, 40)
    assert load_latest(tmp_path).step == 40


@pytest.mark.parametrize("target, number", [("os.unlink", 2), ("pathlib.Path.rename", 1)])  # half gone, and gone
def test_a_kill_while_a_step_is_replaced_leaves_the_one_before(tmp_path, monkeypatch, target, number):
    save_checkpoint(tmp_path, 10, {"model": {"w": torch.ones(1)}}, {})
    save_checkpoint(tmp_path, 20, {"model": {"w": torch.ones(1)}}, {})
    save_and_die(monkeypatch, tmp_path, 20, target, number)
    assert newest_checkpoint(tmp_path, Processes()).step == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


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
