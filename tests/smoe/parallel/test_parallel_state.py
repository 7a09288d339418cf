"""Checkpoints are whole: written with any number of ranks, loaded with any other number or without parallelism."""

import copy
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_parallel_training import ADAM, Tiny, make_model, share

from smoe import set_top_k
from smoe.parallel import ParallelGroups, clip_grad_norm_, gather_state, parallelize, shard_state
from smoe.train.resume import restore_optimizer
from smoe.train.state import optimizer_tensors


def step(model, optimizer, rank: int, world_size: int, number: int, groups) -> float:
    set_top_k(model, 3)
    optimizer.zero_grad()
    loss = model(*share(rank, world_size, number))["loss"]
    loss.backward()
    if groups is not None and groups.world_size > 1:  # what DDP does
        for name, parameter in model.named_parameters():
            if ".experts." not in name or groups.expert_parallel == 1:
                torch.distributed.all_reduce(parameter.grad.div_(world_size))
        torch.distributed.all_reduce(loss.detach().div_(world_size))
    clip_grad_norm_(model, 0.5, groups)
    optimizer.step()
    return loss.item()


def write(rank: int, expert_parallel: int, folder: str) -> float:
    """Trains three steps, writes a checkpoint, and returns the loss of the next step."""
    world_size = torch.distributed.get_world_size()
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    model = parallelize(make_model(), groups)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    for number in range(3):
        step(model, optimizer, rank, world_size, number, groups)
    weights = gather_state(model.state_dict(), model, groups)
    moments = gather_state(optimizer_tensors(optimizer, model), model, groups)
    assert (weights is None) == (moments is None) == (rank > 0)
    if rank == 0:
        save_file(weights, Path(folder) / "model.safetensors")
        save_file(moments, Path(folder) / "optimizer.safetensors")
    return step(model, optimizer, rank, world_size, 3, groups)


def read(rank: int, expert_parallel: int, folder: str) -> float:
    world_size = torch.distributed.get_world_size()
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    torch.manual_seed(77)  # not the weights that are loaded
    model = parallelize(Tiny("learned"), groups)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    load(model, optimizer, folder, groups)
    return step(model, optimizer, rank, world_size, 3, groups)


def load(model, optimizer, folder: str, groups) -> None:
    model.load_state_dict(shard_state(load_file(Path(folder) / "model.safetensors"), model, groups))
    moments = shard_state(load_file(Path(folder) / "optimizer.safetensors"), model, groups)
    restore_optimizer(optimizer, moments, model)


@pytest.mark.distributed
def test_written_by_four_read_by_one_two_and_four(tmp_path):
    (loss, *others) = run_ranks(write, 4, 2, str(tmp_path))
    assert others == [loss] * 3
    model, groups = Tiny("learned"), ParallelGroups.create()
    whole = load_file(tmp_path / "model.safetensors")
    assert {name: value.shape for name, value in whole.items()} == {n: v.shape for n, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    load(model, optimizer, str(tmp_path), groups)
    losses = {"one process": step(model, optimizer, 0, 1, 3, groups)}
    for world_size, expert_parallel in ((2, 1), (2, 2), (4, 4), (4, 2)):
        found = run_ranks(read, world_size, expert_parallel, str(tmp_path))
        losses[f"{world_size} ranks, expert_parallel {expert_parallel}"] = found[0]
    assert losses == {name: pytest.approx(loss, abs=1e-6) for name in losses}


def through_ddp(rank: int) -> None:
    whole = make_model().state_dict()
    groups = ParallelGroups.create(2, timeout=60)
    model = parallelize(make_model(), groups)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    gathered = gather_state(wrapped.state_dict(), wrapped, groups)
    if rank == 0:
        assert gathered.keys() == wrapped.state_dict().keys() != whole.keys()
        assert all(torch.equal(value, gathered[f"module.{name}"]) for name, value in whole.items())
    wrapped.load_state_dict(shard_state({f"module.{name}": value for name, value in whole.items()}, wrapped, groups))


@pytest.mark.distributed
def test_names_may_have_the_prefix_of_ddp():
    """If gather_state did not know the prefix, it would return rank 0's shards as whole tensors."""
    run_ranks(through_ddp, 2)


def test_one_process_needs_no_groups():
    """Without a process group every function works and changes nothing."""
    groups = ParallelGroups.create()
    assert (groups.world_size, groups.expert_parallel, groups.expert_data_parallel) == (1, 1, 1)
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert parallelize(model, groups) is model and all(layer.dispatch is None for layer in model.mlps)
    assert gather_state(before, model, groups) == before == shard_state(before, model, groups)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each(*share(0, 1, 0))["loss"].backward()
    norm = clip_grad_norm_(model, 0.01, groups)
    assert norm == torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
