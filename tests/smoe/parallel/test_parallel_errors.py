"""A mistake gives one clear line on every rank, and no rank waits forever."""

import time

import pytest
import torch
from ranks import run_ranks
from test_parallel_training import N, Tiny, make_model
from torch.nn.parallel import DistributedDataParallel

import smoe.flops
from smoe import SMoE, set_top_k
from smoe.parallel import ParallelGroups, check_agreement, parallelize, sync_expert_gradients
from smoe.parallel.agreement import raise_disagreement


def message(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def dense_mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))


def mistakes(rank: int) -> list[str]:
    groups = ParallelGroups.create(2, timeout=30)
    wide = torch.nn.Sequential(SMoE(8, 16, 2), SMoE(8, 15, 3))
    found = [
        message(lambda: ParallelGroups.create(3)),
        message(lambda: ParallelGroups.create(0)),
        message(lambda: parallelize(wide, groups)),
        message(lambda: check_agreement({"seed": 1, "k": 1 + rank, "lr": 0.1 * rank}, groups)),
    ]
    assert wide[0].dispatch is None and wide[0].experts.up.shape[0] == 2
    check_agreement({"seed": 1, "k": 3}, groups)
    model = parallelize(make_model(), groups)
    found.append(message(lambda: parallelize(model, groups)))
    found.append(message(model.mlps[0].reset_parameters))
    set_top_k(model, 2 + rank)
    found.append(message(lambda: model(*torch.zeros(2, 1, 5, dtype=torch.int64))))
    set_top_k(model, 2)
    around = DistributedDataParallel(torch.nn.ModuleDict({"inner": model}))
    model(*torch.zeros(2, 1, 5, dtype=torch.int64))["loss"].backward()
    found.append(message(lambda: sync_expert_gradients(around, groups)))
    found.append(message(lambda: smoe.slim(model, {f"mlps.{i}": torch.ones(N) for i in range(2)}, keep=4)))
    found.append(message(lambda: smoe.save_pretrained(model, "nowhere")))
    found.append(message(lambda: smoe.flops.count(model, (torch.zeros(1, 5, dtype=torch.int64),) * 2)))
    modulized = parallelize(smoe.modulize(dense_mlp(), num_experts=4), groups)
    found.append(message(lambda: smoe.demodulize(modulized)))
    return found


@pytest.mark.distributed
def test_one_clear_line_on_every_rank():
    lines, others = run_ranks(mistakes, 2)
    assert lines == others
    expected = [
        "expert_parallel is 3, which does not divide the 2 processes of this run; possible are 1, 2",
        "expert_parallel is 0; it must be a whole number of at least 1",
        "layer 1 has 3 experts, which expert_parallel = 2 does not divide",
        "k is 1 on rank 0, 2 on rank 1; lr is 0.0 on rank 0, 0.1 on rank 1; every rank must have the same",
        "layer mlps.0 is parallelized already; call parallelize once per model",
        "the experts are spread over ranks; call reset_parameters before parallelize",
    ]
    assert lines[:6] == expected
    assert lines[6].startswith("top_k is 2 on rank 0, 3 on rank 1; ")
    assert lines[7].startswith(
        "DDP averages inner.mlps.0.experts.down over ranks that hold different experts; call ignore_experts_in_ddp("
    )
    for line, doing in zip(lines[8:], ("slim", "save_pretrained", "count", "demodulize"), strict=True):
        assert line.startswith(f"{doing}: the experts of layer ")


def one_is_late(rank: int) -> float:
    groups = ParallelGroups.create(2, timeout=1)
    model = parallelize(make_model(), groups)
    start = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError):
            model(*torch.zeros(2, 1, 5, dtype=torch.int64))
        return time.monotonic() - start
    time.sleep(3)
    return 0.0


@pytest.mark.distributed
def test_waiting_is_bounded():
    assert run_ranks(one_is_late, 2)[0] < 20


def test_single_process():
    assert message(lambda: ParallelGroups.create(2)) == (
        "expert_parallel is 2, which does not divide the 1 process of this run; possible are 1"
    )
    assert N % 3
    groups = ParallelGroups(0, 3, 3, 0, None, 1, None)
    assert message(lambda: parallelize(Tiny(), groups)).startswith("layer mlps.0 has 8 experts")


def test_ranks_are_named_in_spans():
    values = [{"k": 1}] * 3 + [{"k": 2}, {}] + [{"k": 1}]
    expected = "k is 1 on ranks 0-2, 5, 2 on rank 3, '(missing)' on rank 4; every rank must have the same"
    assert message(lambda: raise_disagreement(values, range(6))) == expected
