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


class Padded(Model):
    """Reads x (B, T, d) and a mask (B, T) that it has no use for."""

    def forward(self, x, mask=None):
        return super().forward(x)


def test_padding_has_no_vote():
    model = Padded()
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 5])
    votes = smoe.vote(model, [{"x": x, "mask": mask} for x in BATCHES], mask="mask")
    expected = torch.zeros(N, dtype=torch.int64)
    for x in BATCHES:
        expected += torch.bincount(model.layers[0].router(x[mask.bool()]).indices.flatten(), minlength=N)
    assert torch.equal(votes["layers.0"], expected) and all(v.sum() == 4 * 8 * 2 for v in votes.values())
    by_index = smoe.vote(model, [(x, mask.bool()) for x in BATCHES], mask=1)
    by_layer = smoe.vote(model, [{"x": x, "mask": mask} for x in BATCHES], mask={"layers.0": "mask", "": "mask"})
    assert torch.equal(by_index["layers.0"], expected) and torch.equal(by_layer["layers.0"], expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("attention_mask", "mask is 'attention_mask', but a batch .dict. has no such entry"),
        ("x", "the mask of a batch has 120 entries, but layer layers.0 saw 15 tokens"),
        ({"layers.0": "mask"}, "mask has no entry for layer layers.1"),
    ],
)
def test_wrong_masks(mask, message):
    model = Padded().train()
    with pytest.raises(ValueError, match=message):
        smoe.vote(model, [{"x": BATCHES[0], "mask": torch.ones(3, 5)}], mask=mask)
    assert model.training


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


@pytest.mark.parametrize("output_scale", ["num_experts", "k", 3.0])
@pytest.mark.parametrize("score", ["softmax_after_topk", "softmax_before_topk", "sum"])
@pytest.mark.parametrize("router", ["random", "learned"])
def test_a_token_whose_experts_all_stay_is_computed_as_before(router, score, output_scale):
    layer = smoe.SMoE(D, H, N, 2, router=router, score=score, output_scale=output_scale, seed=1)
    with torch.no_grad():  # the last experts are never chosen, and have no probability to give away
        layer.router.bias.copy_(torch.tensor([100.0] * 5 + [0.0] * 3))
    x = torch.randn(50, D)
    before = layer(x)
    smoe.slim(layer, smoe.vote(layer, [x]), keep=5)
    torch.testing.assert_close(layer(x), before)
    smoe.slim(layer, {"": torch.arange(5.0)}, keep=4)  # and a second time: the scale is a number by now
    assert layer.scale == {"num_experts": N, "k": 2, 3.0: 3.0}[output_scale]


def test_softmax_over_all_experts_is_over_those_that_stay():
    layer = smoe.SMoE(D, H, N, 2, score="softmax_before_topk", output_scale="num_experts", seed=1)
    x = torch.randn(20, D)
    before, logits = layer.router(x), layer.router.logits(x)
    keep_experts(layer, torch.arange(5))
    stayed = (before.indices < 5).all(1)
    assert 0 < stayed.sum() < 20
    probability = logits.softmax(-1)[stayed, :5].sum(-1, keepdim=True)
    torch.testing.assert_close(layer.router(x).weights[stayed], before.weights[stayed] / probability)
    assert layer.scale == N


def test_the_scale_of_training_stays_when_all_experts_do():
    layer = smoe.SMoE(D, H, N, 2, output_scale="num_experts", seed=1)
    smoe.slim(layer, {"": torch.ones(N)}, keep=N)
    assert layer.output_scale == "num_experts" and layer.scale == N


@pytest.mark.parametrize("part", ["router", "experts"])
def test_layers_that_share_a_part_are_slimmed_together(part):
    model = Model()
    setattr(model.layers[1], part, getattr(model.layers[0], part))
    other = {"layers.0": torch.arange(N), "layers.1": torch.arange(N).flip(0)}
    with pytest.raises(ValueError, match=f"layers.0 and layers.1 share their {part}"):
        smoe.slim(model, other, keep=3)
    assert all(layer.num_experts == N for layer in model.layers)
    smoe.slim(model, {name: torch.arange(N) for name in other}, keep=3)
    assert getattr(model.layers[0], part) is getattr(model.layers[1], part)
    assert all(layer.experts.up.shape[0] == layer.router.weight.shape[0] == 3 for layer in model.layers)
    assert model(BATCHES[0]).isfinite().all()


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
        ({"layers.0": torch.zeros(N), "layers.1": torch.full((N,), float("nan"))}, 4, "layers.1 are .nan"),
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
