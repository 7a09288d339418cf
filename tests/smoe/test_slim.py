"""Votes for experts, and keeping those with the most votes."""

import types

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


class Attending(Model):
    """Called as Transformers' models are; ``config`` as theirs."""

    def __init__(self, two_parts=False):
        super().__init__()
        self.config = types.SimpleNamespace(is_encoder_decoder=two_parts)
        if two_parts:
            self.encoder, self.decoder = self.layers
            del self.layers

    def forward(self, x, attention_mask=None, decoder_attention_mask=None):
        if not self.config.is_encoder_decoder:
            return super().forward(x)
        return self.decoder(self.encoder(x)[:, :4])


LENGTHS = [5, 3, 1]
MASK = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).long()


@pytest.mark.parametrize("score", ["count", "weight", "reap"])
def test_votes_with_padding_are_those_without_the_padded_tokens(score):
    model = Attending()
    padded = [{"x": x, "attention_mask": MASK} for x in BATCHES]
    alone = [{"x": x[i : i + 1, :length]} for x in BATCHES for i, length in enumerate(LENGTHS)]
    votes, expected = smoe.vote(model, padded, score=score), smoe.vote(model, alone, score=score)
    for name, value in expected.items():
        torch.testing.assert_close(votes[name], value, atol=1e-5, rtol=1e-5)
    everything = smoe.vote(model, padded, mask=False, score=score)
    unmasked = smoe.vote(model, [{"x": x} for x in BATCHES], score=score)
    assert all(torch.equal(everything[name], unmasked[name]) for name in everything)
    assert not torch.equal(everything["layers.0"], votes["layers.0"])


def test_an_encoder_decoder_has_a_mask_for_each_part():
    model = Attending(two_parts=True)
    shorter = MASK[:, :4].flip(0)
    batches = [{"x": x, "attention_mask": MASK, "decoder_attention_mask": shorter} for x in BATCHES]
    found = smoe.vote(model, batches)
    named = smoe.vote(model, batches, mask={"encoder": "attention_mask", "decoder": "decoder_attention_mask"})
    assert [v.sum() for v in found.values()] == [2 * 4 * MASK.sum(), 2 * 4 * shorter.sum()]
    assert all(torch.equal(found[name], named[name]) for name in named)
    half = smoe.vote(model, [{"x": x, "attention_mask": MASK} for x in BATCHES])
    assert half["decoder"].sum() == 2 * 4 * 12, "a part without a mask counts all its tokens"


def test_a_mask_of_other_sizes_is_no_mask_of_tokens():
    model = Attending()
    square = torch.ones(3, 1, 5, 5)
    assert smoe.vote(model, [{"x": BATCHES[0], "attention_mask": square}])["layers.0"].sum() == 30
    with pytest.raises(ValueError, match="has 12 entries, but layer layers.0 saw 15 .* or be False"):
        smoe.vote(model, [{"x": BATCHES[0], "attention_mask": torch.ones(3, 4)}])


@pytest.mark.parametrize("output_scale", [1, "num_experts"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router", ["random", "learned"])
def test_every_score_is_that_of_a_loop_over_tokens(router, gated, output_scale):
    model = Model(router=router, gated=gated, output_scale=output_scale)
    for layer in model.layers:
        nn.init.normal_(layer.experts.down_bias)
    counts = {name: torch.zeros(N) for name in ("layers.0", "layers.1")}
    weights, gained = ({name: torch.zeros(N) for name in counts} for _ in range(2))
    for x in BATCHES:
        x = x.reshape(-1, D)
        for layer, name in zip(model.layers, counts, strict=True):
            logits = x @ layer.router.weight.T + layer.router.bias
            for token, row in zip(x, logits, strict=True):
                chosen = row.argsort(descending=True)[:2]
                for e, weight in zip(chosen.tolist(), row[chosen].softmax(0), strict=True):
                    counts[name][e] += 1
                    weights[name][e] += weight
                    gained[name][e] += weight * layer.scale * one_expert(layer.experts, e, token).norm()
            x = x + layer(x)
    expected = {"count": counts, "weight": weights}
    expected["reap"] = {name: gained[name] / counts[name].clamp(min=1) for name in counts}
    for score, by_layer in expected.items():
        votes = smoe.vote(model, BATCHES, score=score)
        for name, value in by_layer.items():
            torch.testing.assert_close(votes[name].float(), value.detach(), atol=1e-4, rtol=1e-4)


def one_expert(experts, e, x):
    """What expert ``e`` makes of x (d,) or (T, d)."""
    up = x @ experts.up[e].T + experts.up_bias[e]
    hidden = torch.relu(x @ experts.gate[e].T + experts.gate_bias[e]) * up if experts.gated else torch.relu(up)
    return hidden @ experts.down[e] + experts.down_bias[e]


def test_reap_looks_at_an_expert_even_at_full_k_and_leaves_no_hook():
    model = Model()
    smoe.set_top_k(model, N)
    votes = smoe.vote(model, BATCHES, score="reap")
    assert all(len(set(v.tolist())) == N for v in votes.values())
    assert not any(layer.experts._forward_pre_hooks for layer in model.layers)
    with pytest.raises(ValueError, match="score is 'norm'; it must be one of count, weight, reap"):
        smoe.vote(model, BATCHES, score="norm")


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


def masked_routing(layer, kept, x, ids, generator):
    """What ``layer``'s router chooses where all experts but ``kept`` have a logit of -inf: indices and weights."""
    router, k = layer.router, layer.top_k
    dropped = torch.ones(N, dtype=torch.bool).index_fill(0, kept, False)
    linear = hasattr(router, "weight")
    logits = (x @ router.weight.T + router.bias if linear else torch.zeros(len(x), N)).masked_fill(dropped, -torch.inf)
    if linear:
        indices = logits.argsort(1, descending=True)[:, :k]
    elif router.needs_token_ids:
        indices = torch.tensor([[e for e in router.table[i].tolist() if e in kept][:k] for i in ids.tolist()])
    else:
        draw = torch.full((len(x), N), -1.0).index_copy(1, kept, torch.rand(len(x), len(kept), generator=generator))
        indices = draw.argsort(1, descending=True)[:, :k]
    weights = {
        "softmax_after_topk": logits.gather(1, indices).softmax(1),
        "softmax_before_topk": logits.softmax(1).gather(1, indices),
        "sum": torch.ones(indices.shape),
    }[router.score]
    return indices, weights


@pytest.mark.parametrize("output_scale", ["num_experts", "k", 2.0])
@pytest.mark.parametrize("router", ["random", "learned", "hash", "uniform"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("score", ["softmax_after_topk", "softmax_before_topk", "sum"])
def test_slimmed_layer_equals_the_whole_one_that_chooses_among_the_kept(router, gated, score, output_scale):
    torch.manual_seed(0)
    options = {"router": router, "gated": gated, "score": score, "output_scale": output_scale, "seed": 1}
    whole, slim = (smoe.SMoE(D, H, N, 2, vocab_size=30 if router == "hash" else None, **options) for _ in range(2))
    kept = torch.tensor([1, 4, 6])
    slim.load_state_dict(whole.state_dict())
    keep_experts(slim, kept)
    x, ids = torch.randn(11, D), torch.randint(30, (11,))
    indices, weights = masked_routing(whole, kept, x, ids, torch.Generator().manual_seed(3))
    every = torch.stack([one_expert(whole.experts, e, x) for e in range(N)], 1)  # (T, N, d)
    chosen = every.gather(1, indices.unsqueeze(2).expand(-1, -1, D))
    expected = whole.scale * (weights.unsqueeze(2) * chosen).sum(1)
    torch.manual_seed(3)
    torch.testing.assert_close(slim(x, token_ids=ids), expected, atol=1e-6, rtol=1e-6)
    assert slim.num_experts == 3 and slim.d_hidden == 3 * H // N


@pytest.mark.parametrize("router", ["random", "learned", "hash", "uniform"])
@pytest.mark.parametrize("score", ["softmax_after_topk", "softmax_before_topk", "sum"])
def test_to_keep_all_changes_nothing(router, score):
    layer = smoe.SMoE(D, H, N, 3, router=router, score=score, output_scale="num_experts", vocab_size=30, seed=1)
    x, ids = torch.randn(11, D), torch.randint(30, (11,))
    state, torch_state = {name: value.clone() for name, value in layer.state_dict().items()}, torch.get_rng_state()
    before = layer(x, token_ids=ids)
    smoe.slim(layer, {"": torch.randn(N)}, keep=N)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    torch.set_rng_state(torch_state)
    assert torch.equal(layer(x, token_ids=ids), before)


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


def test_one_keep_per_layer():
    model = Model()
    votes = {"layers.0": torch.arange(N), "layers.1": torch.arange(N).flip(0)}
    rows = [layer.router.weight.clone() for layer in model.layers]
    for wrong, message in (([3], "1 numbers; Model has 2 SMoE layers, so it must be one number or 2"), ([3, 9], "9")):
        with pytest.raises(ValueError, match=message):
            smoe.slim(model, votes, keep=wrong)
    smoe.slim(model, votes, keep=[5, 2])
    assert [layer.num_experts for layer in model.layers] == [5, 2]
    assert torch.equal(model.layers[0].router.weight, rows[0][3:])
    assert torch.equal(model.layers[1].router.weight, rows[1][:2])
    assert model(BATCHES[0]).isfinite().all()


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
