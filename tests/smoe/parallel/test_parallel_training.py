"""Twenty steps on several ranks end where one process ends: data parallel, expert parallel, both; by hand, with
accelerate, with transformers.Trainer."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smoe import SMoE, k_at, set_top_k
from smoe.parallel import ParallelGroups, clip_grad_norm_, gather_state, parallelize

D, VOCAB, N, STEPS, BATCH, LENGTH = 16, 23, 8, 20, 8, 5
# Adam divides by the root of the second moment: where a gradient is rounding alone, a small eps makes it a full step.
ADAM = {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.01}


class Tiny(nn.Module):
    """Embedding, two residual SMoE layers of different routers, an untied output layer; mean cross entropy."""

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
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def batch(step: int):
    """Mostly one token: its experts get nearly everything."""
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


def one_process(max_norm: float = 0.5):
    """(losses, norms, final weights) of plain PyTorch."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
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
