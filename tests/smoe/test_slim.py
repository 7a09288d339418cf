"""Votes for experts, and keeping those with the most votes."""

import pytest
import torch
from torch import nn

import smoe
from smoe.slim import keep_experts

D, H, N = 8, 32, 8


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(smoe.SMoE(D, H, N, 2, seed=i, **options) for i in range(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, flip=False):
        for layer in self.layers:
            x = x + self.dropout(layer(-x if flip else x))
        return x


BATCHES = [torch.randn(3, 5, D, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_votes_are_the_choices_of_the_routers():
    model = Model().train()
    votes = smoe.vote(model, BATCHES)
    assert list(votes) == ["layers.0", "layers.1"] and model.training and model.dropout.training
    expected = torch.zeros(N, dtype=torch.int64)
    for x in BATCHES:
        expected += torch.bincount(model.layers[0].router(x.reshape(-1, D)).indices.flatten(), minlength=N)
    assert torch.equal(votes["layers.0"], expected)
    assert all(v.sum() == 4 * 15 * 2 for v in votes.values())
    # A second reading gives the same votes: dropout is off.
    assert all(torch.equal(a, b) for a, b in zip(votes.values(), smoe.vote(model, BATCHES).values(), strict=True))


def test_batches_of_every_kind():
    model = Model()
    plain = smoe.vote(model, BATCHES)
    by_name = smoe.vote(model, ({"x": x} for x in BATCHES))
    by_place = smoe.vote(model, [(x,) for x in BATCHES])
    flipped = smoe.vote(model, [(x, True) for x in BATCHES])
    assert all(torch.equal(plain[n], by_name[n]) and torch.equal(plain[n], by_place[n]) for n in plain)
    assert not torch.equal(plain["layers.0"], flipped["layers.0"])


def test_votes_at_full_k_warn_that_all_are_equal():
    model = Model()
    smoe.set_top_k(model, N)
    with pytest.warns(UserWarning, match="set_top_k"):
        votes = smoe.vote(model, BATCHES)
    assert all(len(set(v.tolist())) == 1 for v in votes.values())


def test_no_batches_or_no_layers():
    with pytest.raises(ValueError, match="batches is empty"):
        smoe.vote(Model(), [])
    with pytest.raises(ValueError, match="has no SMoE layer"):
        smoe.vote(nn.Linear(2, 2), BATCHES)
    with pytest.raises(ValueError, match="has no SMoE layer"):
        smoe.slim(nn.Linear(2, 2), {}, 1)


@pytest.mark.parametrize("router", ["random", "learned"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("score", ["softmax_after_topk", "sum"])
def test_slimmed_layer_equals_the_whole_one_that_chooses_among_the_kept(router, gated, score):
    torch.manual_seed(0)
    whole = smoe.SMoE(D, H, N, 2, router=router, gated=gated, score=score, seed=1)
    kept = torch.tensor([1, 4, 6])
    slim = smoe.SMoE(D, H, N, 2, router=router, gated=gated, score=score, seed=1)
    slim.load_state_dict(whole.state_dict())
    keep_experts(slim, kept)
    with torch.no_grad():  # experts that are not kept are never chosen
        whole.router.bias[torch.tensor([0, 2, 3, 5, 7])] = -1e4
    x = torch.randn(11, D)
    torch.testing.assert_close(slim(x), whole(x))
    assert torch.equal(kept[slim.router(x).indices].sort(1).values, whole.router(x).indices.sort(1).values)
    assert slim.num_experts == 3 and slim.d_hidden == 3 * H // N


def test_slim_keeps_the_most_voted_in_order():
    model = Model()
    votes = {"layers.0": torch.tensor([5, 0, 9, 1, 9, 0, 7, 2]), "layers.1": torch.tensor([3, 3, 3, 3, 3, 3, 3, 3])}
    before = [layer.experts.up.detach().clone() for layer in model.layers]
    rows = [layer.router.weight.clone() for layer in model.layers]
    total = sum(p.numel() for p in model.parameters())
    smoe.set_top_k(model, 6)
    assert smoe.slim(model, votes, keep=4) is model
    for i, kept in enumerate(([0, 2, 4, 6], [0, 1, 2, 3])):
        assert torch.equal(model.layers[i].experts.up, before[i][kept])
        assert torch.equal(model.layers[i].router.weight, rows[i][kept])
    assert sum(p.numel() for p in model.parameters()) == total // 2
    assert smoe.get_top_k(model) == 4
    smoe.set_top_k(model, 2)
    model(BATCHES[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="1 to num_experts = 4"):
        smoe.set_top_k(model, 5)


def test_hash_router_forgets_the_others():
    layer = smoe.SMoE(D, H, N, 2, router="hash", vocab_size=30, seed=0)
    kept, table = [1, 4, 6], layer.router.table.clone()
    keep_experts(layer, torch.tensor(kept))
    for old, new in zip(table.tolist(), layer.router.table.tolist(), strict=True):
        assert [kept[i] for i in new] == [e for e in old if e in kept]
    assert layer(torch.randn(4, D), token_ids=torch.arange(4)).shape == (4, D)


def test_uniform_router_draws_among_the_kept():
    layer = smoe.SMoE(D, H, N, 2, router="uniform")
    keep_experts(layer, torch.tensor([2, 3, 5]))
    assert layer.router(torch.randn(50, D)).indices.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("votes", "keep", "message"),
    [
        ({"layers.0": torch.zeros(N)}, 4, "'layers.1' is only in the model"),
        ({"layers.0": torch.zeros(N), "layers.1": torch.zeros(3)}, 4, r"layers.1 have shape \(3,\); it must be \(8,\)"),
        (
            {"layers.0": torch.zeros(N), "layers.1": torch.zeros(N)},
            9,
            "keep is 9; it must be a whole number from 1 to 8",
        ),
        ({"layers.0": torch.zeros(N), "layers.1": torch.zeros(N)}, 0, "keep is 0"),
    ],
)
def test_wrong_votes_change_nothing(votes, keep, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        smoe.slim(model, votes, keep)
    assert all(layer.num_experts == N for layer in model.layers)


def test_slimmed_and_back_to_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    smoe.modulize(model, N, top_k=2, score="sum", seed=0)
    smoe.slim(model, smoe.vote(model, BATCHES), keep=4)
    x = torch.randn(5, D)
    smoe.set_top_k(model, 4)
    y = model(x)
    smoe.demodulize(model)
    assert (model[0].out_features, model[2].in_features) == (H // 2, H // 2)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(smoe.modulize(model, 4, score="sum")(x), y)
