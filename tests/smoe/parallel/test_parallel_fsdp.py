"""FSDP2, alone and with expert parallelism, has the losses, norms and weights of a single process; checkpoints."""

import warnings
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_parallel_training import ADAM, STEPS, Tiny, batch, check, k_of, make_model, one_process, share
from torch import nn

from smoe import set_top_k
from smoe.parallel import ParallelGroups, clip_grad_norm_, fully_shard_model, gather_state, parallelize, shard_state
from smoe.train.resume import restore_optimizer
from smoe.train.state import optimizer_tensors

pytestmark = pytest.mark.distributed


def sharded(model, expert_parallel: int, **adam):
    # It warns about in-place changes of outputs, which these tests do not make.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    model = fully_shard_model(parallelize(model, groups), groups)
    return groups, model, torch.optim.AdamW(model.parameters(), **ADAM, **adam)


def run_step(model, optimizer, groups, rank: int, step: int, accumulate: int = 1) -> tuple[float, float]:
    set_top_k(model, k_of(step))
    optimizer.zero_grad()
    total = torch.zeros(())
    mine = share(rank, groups.world_size, step)
    for part in zip(*(part.chunk(accumulate) for part in mine), strict=True):
        loss = model(*part)["loss"] / accumulate
        loss.backward()
        total += loss.detach()
    norm = clip_grad_norm_(model, 0.5, groups).item()
    optimizer.step()
    torch.distributed.all_reduce(total.div_(groups.world_size))
    return total.item(), norm


def train(rank: int, expert_parallel: int, accumulate: int, adam: dict, wanted) -> None:
    groups, model, optimizer = sharded(make_model(), expert_parallel, **adam)
    local = sum(p.to_local().numel() for p in model.parameters())
    assert local <= 1.1 * sum(p.numel() for p in make_model().parameters()) / groups.world_size
    losses, norms = zip(
        *(run_step(model, optimizer, groups, rank, step, accumulate) for step in range(STEPS)), strict=True
    )
    check(losses, norms, gather_state(model.state_dict(), model, groups), wanted)


@pytest.fixture(scope="module")
def wanted():
    return one_process()


@pytest.mark.parametrize(
    "world_size, expert_parallel, accumulate, adam",
    [(2, 1, 1, {}), (2, 2, 1, {"fused": True}), (4, 2, 1, {"foreach": True}), (4, 2, 2, {}), (4, 4, 1, {})],
)
def test_equals_one_process(world_size, expert_parallel, accumulate, adam, wanted):
    run_ranks(train, world_size, expert_parallel, accumulate, adam, wanted)


def two_passes(rank: int) -> None:
    """Two forward passes with different k and one backward, as THOR does."""
    whole = make_model()
    groups, model, _ = sharded(make_model(), 2)
    for each in (whole, model):
        losses = []
        for k in (2, 5):
            set_top_k(each, k)
            losses.append(each(*batch(0))["loss"])
        (losses[0] + losses[1] ** 2).backward()
    want = nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    torch.testing.assert_close(clip_grad_norm_(model, 0.1, groups), want)
    gradients = gather_state({n: p.grad for n, p in model.named_parameters()}, model, groups)
    for name, parameter in whole.named_parameters() if rank == 0 else ():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_two_passes_in_one_backward():
    run_ranks(two_passes, 4)


def save_and_continue(rank: int, folder: str) -> tuple[float, float]:
    groups, model, optimizer = sharded(make_model(), 2)
    run_step(model, optimizer, groups, rank, 0)
    weights = gather_state(model.state_dict(), model, groups)
    moments = gather_state(optimizer_tensors(optimizer, model), model, groups)
    if rank == 0:
        save_file(weights, Path(folder) / "model.safetensors")
        save_file(moments, Path(folder) / "optimizer.safetensors")
    return run_step(model, optimizer, groups, rank, 1)


def resume(rank: int, expert_parallel: int, folder: str) -> tuple[float, float]:
    torch.manual_seed(77)  # not the weights that are loaded
    groups, model, optimizer = sharded(Tiny("learned"), expert_parallel)
    model.load_state_dict(shard_state(load_file(Path(folder) / "model.safetensors"), model, groups))
    moments = shard_state(load_file(Path(folder) / "optimizer.safetensors"), model, groups)
    restore_optimizer(optimizer, moments, model)
    return run_step(model, optimizer, groups, rank, 1)


def test_checkpoints_are_whole(tmp_path):
    saved = run_ranks(save_and_continue, 4, str(tmp_path))
    Tiny("learned").load_state_dict(load_file(tmp_path / "model.safetensors"))  # the state of a whole model
    for world_size, expert_parallel in ((2, 1), (4, 4)):
        assert run_ranks(resume, world_size, expert_parallel, str(tmp_path))[0] == pytest.approx(saved[0], abs=1e-5)


def test_fsdp_needs_several_ranks():
    with pytest.raises(ValueError, match="^world_size is 1; FSDP shards over several ranks"):
        fully_shard_model(make_model(), ParallelGroups.create())
