"""Twenty steps with data parallelism, expert parallelism or both have the losses and weights of a single process."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smoe import SMoE, k_at, set_top_k
from smoe.parallel import ParallelGroups, clip_grad_norm_, gather_state, parallelize

D, VOCAB, N, STEPS, BATCH, LENGTH = 16, 23, 8, 20, 8, 5
# With a small eps Adam would turn a gradient that is only rounding error into a full step.
ADAM = {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.01}


class Tiny(nn.Module):
    """Embedding, two residual SMoE layers with different routers, an untied output layer; mean cross entropy."""

    def __init__(self, second: str = "random") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.mlps = nn.ModuleList(
            SMoE(D, 64, N, 2, router=router, seed=i, output_scale="k", activation="gelu")
            for i, router in enumerate(("random", second))
        )
        self.out = nn.Linear(D, VOCAB)

    def forward(self, ids, labels):
        x = self.embedding(ids)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        logits = self.out(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / max(labels.numel(), 1)
        return {"loss": loss, "logits": logits}


def batch(step: int):
    """More than half of the ids are the same token, so its experts get most of the work."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    ids[torch.rand(BATCH, LENGTH, generator=generator) < 0.6] = 3
    return ids, torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)


def share(rank: int, world_size: int, step: int):
    return tuple(part.chunk(world_size)[rank] for part in batch(step))


def make_model() -> Tiny:
    torch.manual_seed(1)
    return Tiny("learned")


def k_of(step: int) -> int:
    return k_at(step, STEPS, 1, N)


def one_process(max_norm: float = 0.5, **adam):
    """(losses, norms, final weights) of a single process with plain PyTorch."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), **{**ADAM, **adam})
    losses, norms = [], []
    for step in range(STEPS):
        set_top_k(model, k_of(step))
        loss = model(*batch(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


def check(losses, norms, whole, wanted) -> None:
    want_losses, want_norms, want_state = wanted
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(want_norms), rtol=1e-4, atol=1e-5)
    if whole is not None:
        assert whole.keys() == want_state.keys()
        for name, value in want_state.items():
            torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def train_by_hand(rank: int, expert_parallel: int, accumulate: int, wanted) -> None:
    world = torch.distributed.get_world_size()
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    bare = parallelize(make_model(), groups)
    model = DistributedDataParallel(bare)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        set_top_k(model, k_of(step))
        optimizer.zero_grad()
        total = torch.zeros(())
        parts = list(zip(*(part.chunk(accumulate) for part in share(rank, world, step)), strict=True))
        for i, part in enumerate(parts):
            model.require_backward_grad_sync = i == len(parts) - 1  # what no_sync() sets
            loss = model(*part)["loss"] / accumulate
            loss.backward()
            total += loss.detach()
        norms.append(clip_grad_norm_(model, 0.5, groups).item())
        optimizer.step()
        torch.distributed.all_reduce(total.div_(world))
        losses.append(total.item())
    check(losses, norms, gather_state(bare.state_dict(), model, groups), wanted)


@pytest.fixture(scope="module")
def wanted():
    return one_process()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size, expert_parallel, accumulate",
    [(2, 1, 1), (2, 2, 1), (2, 2, 2), (4, 1, 1), (4, 4, 1), (4, 2, 1), (4, 2, 2)],
)
def test_by_hand(world_size, expert_parallel, accumulate, wanted):
    run_ranks(train_by_hand, world_size, expert_parallel, accumulate, wanted)


def train_uneven(rank: int, expert_parallel: int, wanted) -> None:
    """Ranks have batches of different sizes, one of them empty; the loss is still the mean over all rows."""
    rows = [0, 5, 2, 1]
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    bare = parallelize(make_model(), groups)
    model = DistributedDataParallel(bare)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        set_top_k(model, k_of(step))
        optimizer.zero_grad()
        mine = tuple(part.split(rows)[rank] for part in batch(step))
        loss = model(*mine)["loss"] * (rows[rank] * len(rows) / BATCH)
        loss.backward()
        norms.append(clip_grad_norm_(model, 0.5, groups).item())
        optimizer.step()
        total = loss.detach() / len(rows)
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    check(losses, norms, gather_state(bare.state_dict(), model, groups), wanted)


@pytest.mark.distributed
@pytest.mark.parametrize("expert_parallel", [4, 2])
def test_uneven_and_empty_ranks(expert_parallel, wanted):
    run_ranks(train_uneven, 4, expert_parallel, wanted)


def two_passes(rank: int, compiled: bool) -> None:
    """Two forward passes with different k and one backward, as THOR does."""

    def gradients(model, call, clip):
        torch.manual_seed(4)
        losses = []
        for k in (2, 5):
            set_top_k(model, k)
            losses.append(call(model)["loss"])
        (losses[0] + losses[1] ** 2).backward()
        return clip(model)

    groups = ParallelGroups.create(2, timeout=60)
    # Every rank has the same batch, because the square of a loss is not a sum over ranks.
    whole, bare = make_model(), parallelize(make_model(), groups)
    model = DistributedDataParallel(torch.compile(bare, backend="eager") if compiled else bare)
    want = gradients(whole, lambda m: m(*batch(0)), lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1))
    norm = gradients(model, lambda m: m(*batch(0)), lambda m: clip_grad_norm_(m, 0.1, groups))
    torch.testing.assert_close(norm, want)
    for name, parameter in whole.named_parameters():
        expected = groups.scatter_experts(parameter.grad) if ".experts." in name else parameter.grad
        torch.testing.assert_close(bare.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True])
def test_two_passes_in_one_backward(compiled):
    run_ranks(two_passes, 2, compiled)
