"""One pass whose rows have different k computes what a pass per row computes, and no more."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn

from smoe import RandomRouter, SMoE, activated, balance_loss, get_top_k, modulize, record_routing, set_top_k, vote
from smoe.compute import PATHS
from smoe.compute.grouping import group
from smoe.flops import count
from smoe.parallel import ParallelGroups, parallelize
from smoe.router import SCORES

B, L, D, N = 5, 7, 16, 8
KS = torch.tensor([1, 8, 3, 2, 8])


def make(**options) -> SMoE:
    torch.manual_seed(0)
    layer = SMoE(D, 64, N, 3, **{"seed": 1, "vocab_size": 11, "activation": "gelu", **options})
    if hasattr(layer.router, "weight"):
        with torch.no_grad():  # with the usual scale the weights would be almost equal
            layer.router.weight.mul_(30)
    return layer


def results(model: nn.Module, k, x: torch.Tensor, grad: torch.Tensor, **inputs) -> list[torch.Tensor]:
    """Output, gradient of x, gradients of the parameters."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with activated(model, k):
        y = model(leaf, **inputs)
        y.backward(grad)
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]


def assert_as_row_by_row(model: nn.Module, k: torch.Tensor, **inputs) -> None:
    """``model`` maps (rows, length, D); k (rows,)."""
    x, grad = torch.randn(2, len(k), L, D)
    got = results(model, k, x, grad, **inputs)
    rows = []
    for b in range(len(k)):
        row = slice(b, b + 1)
        rows.append(results(model, int(k[b]), x[row], grad[row], **{n: t[row] for n, t in inputs.items()}))
    want = [torch.cat(parts) if i < 2 else torch.stack(parts).sum(0) for i, parts in enumerate(zip(*rows, strict=True))]
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 1e-6 * w.abs().max().clamp_min(1)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("router", ["random", "learned", "hash"])
def test_outputs_and_gradients_are_those_of_separate_passes(router, score):
    for path in PATHS:
        for scale in (1, "k", "num_experts"):
            layer = make(router=router, score=score, compute=path, output_scale=scale, gated=scale == "k")
            inputs = {"token_ids": torch.randint(11, (B, L))} if router == "hash" else {}
            assert_as_row_by_row(layer, KS, **inputs)


class FlattensItsBatch(nn.Module):
    """As OPT does around its MLP."""

    def __init__(self, layer: SMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.reshape(-1, D)).view(x.shape)


def test_a_model_of_several_layers_one_of_which_sees_flat_tokens():
    assert_as_row_by_row(nn.Sequential(make(), nn.LayerNorm(D), FlattensItsBatch(make(seed=2))), KS)


@pytest.mark.parametrize("name", ["Llama", "OPT"])
def test_a_model_of_transformers_writes_every_row_as_alone(name):
    from tiny_models import tiny

    model = modulize(tiny(name), N, seed=1, output_scale="num_experts").eval()
    for parameter in model.parameters():  # tiny models hardly differ in what they write
        parameter.data.mul_(3)
    ids, k = torch.randint(3, 40, (3, 6)), torch.tensor([1, 8, 2])
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with activated(model, k):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for b, row in enumerate(ids.split(1)):
        with activated(model, int(k[b])):
            alone = model.generate(row, attention_mask=torch.ones_like(row), **options)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[b, :length], alone.sequences[0])
        for of_all, of_one in zip(together.logits, alone.logits, strict=False):
            torch.testing.assert_close(of_all[b], of_one[0], atol=1e-4, rtol=1e-4)


def test_k_per_token():
    layer, x = make(), torch.randn(B, L, D)
    k = torch.randint(1, N + 1, (B, L))
    with activated(layer, k):
        y = layer(x)
    for one in range(1, N + 1):
        with activated(layer, one):
            torch.testing.assert_close(y[k == one], layer(x)[k == one], atol=1e-6, rtol=0)


@pytest.mark.parametrize("router", ["random", "learned", "uniform", "hash"])
def test_each_token_chooses_as_many_experts_as_its_k_says(router):
    layer = make(router=router)
    with activated(layer, KS), record_routing(layer) as routings:
        layer(torch.randn(B, L, D), token_ids=torch.randint(11, (B, L)))
    (routing,) = routings
    assert routing.absent and routing.indices.shape == (B * L, N)
    assert torch.equal((routing.indices >= 0).sum(1), KS.repeat_interleave(L))
    assert (routing.weights[routing.indices < 0] == 0).all()
    for token in routing.indices:
        chosen = token[token >= 0].tolist()
        assert len(set(chosen)) == len(chosen)


def test_rows_are_padded_by_what_is_computed_not_by_the_largest_k():
    x, indices = torch.randn(4096, 8, dtype=torch.bfloat16), torch.rand(4096, 16).argsort(1)
    absent = indices.masked_fill(torch.arange(16) >= 2, -1)
    assert group(x, absent, 16).num_pairs == group(x, indices[:, :2].contiguous(), 16).num_pairs


def test_the_balance_loss_counts_the_chosen_experts_alone():
    layer, x = make(router="learned"), torch.randn(B, L, D)
    with activated(layer, KS), record_routing(layer) as routings:
        layer(x)
    (routing,) = routings
    shares = torch.stack([(routing.indices == e).sum() for e in range(N)]) / (KS.sum() * L)
    probabilities = torch.softmax(layer.router.logits(x.reshape(-1, D)), dim=-1)
    torch.testing.assert_close(routing.balance_loss, N * (shares * probabilities.mean(0)).sum())
    torch.testing.assert_close(balance_loss(routing), routing.balance_loss)
    mask = torch.zeros(B, L)
    mask[1] = 1  # this row activates all experts
    torch.testing.assert_close(balance_loss(routing, mask), torch.tensor(1.0))


def test_afterwards_everything_is_as_before():
    model = nn.Sequential(make(), make())
    set_top_k(model, [3, 5])
    with activated(model, KS):
        assert get_top_k(model) == 8
        with activated(model, 2):
            assert get_top_k(model) == 2 and model[0].k_per_row is None
        assert model[0].k_per_row is KS
        set_top_k(model, 4)  # ends it
        assert model[1].k_per_row is None
    with pytest.raises(RuntimeError, match="stop"), activated(model, KS):
        raise RuntimeError("stop")
    assert get_top_k(model) == [3, 5] and model[0].k_per_row is model[1].k_per_row is None


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (torch.tensor([1.0, 2.0]), "k is a tensor of torch.float32; it must be one of whole numbers"),
        (torch.tensor([True]), "k is a tensor of torch.bool"),
        (torch.tensor(3), r"k is a tensor of shape \(\); it must have one entry per row"),
        (torch.tensor([], dtype=torch.int64), r"k is a tensor of shape \(0,\)"),
        (torch.tensor([1, 0]), "k has entries from 0 to 1; all must be from 1 to num_experts = 8"),
        (torch.tensor([9, 1]), "k has entries from 1 to 9"),
    ],
)
def test_a_wrong_tensor_is_refused_and_nothing_changed(k, words):
    layer = make()
    with pytest.raises(ValueError, match=words), activated(layer, k):
        pass
    assert layer.top_k == 3 and layer.k_per_row is None


def test_a_tensor_that_does_not_fit_the_batch_is_refused():
    layer = make()
    with activated(layer, KS):
        for shape in ((L, B, D), (B - 1, L, D), (B * L + 1, D)):
            with pytest.raises(ValueError, match=r"k has shape \(5,\), which does not fit an x of shape"):
                layer(torch.randn(shape))


class OwnRouter(RandomRouter):
    def forward(self, x, token_ids=None):
        return super().forward(x, token_ids)


def test_what_cannot_have_a_k_per_row_says_so():
    layer = make()
    layer.router = OwnRouter(D, N, 3)
    with pytest.raises(ValueError, match="OwnRouter.forward has no argument k_per_token"), activated(layer, KS):
        pass
    layer = make()
    layer.engine = "fastmoe"
    with pytest.raises(ValueError, match="engine 'fastmoe' can't take"), activated(layer, KS):
        pass
    layer = make()
    x = torch.randn(B, L, D)
    with activated(layer, KS):
        with pytest.raises(ValueError, match="torch.nn.DataParallel does not split"):
            layer._replicate_for_data_parallel()
        with pytest.raises(ValueError, match="k is a tensor, one per row; count the rows of each k"):
            count(layer, x)
        with pytest.raises(ValueError, match="k is a tensor, one per row; vote at one k"):
            vote(layer, [x])
        with pytest.raises(Exception, match="an exported graph would keep"):
            torch.export.export(layer, (x,))
        with pytest.raises(ValueError, match="an exported graph would keep"):
            torch.jit.trace(layer, x)


@pytest.mark.slow
def test_compiled_in_one_graph():
    layer = make(activation="relu")
    options = {"cpp_cache_precompile_headers": False}  # compiles faster
    compiled, x = torch.compile(layer, fullgraph=True, options=options), torch.randn(B, L, D)
    for k in ([1, 8, 3, 2, 8], [8, 8, 1, 1, 2], [4, 1, 4, 2, 3]):
        with activated(layer, torch.tensor(k)):
            torch.testing.assert_close(compiled(x), layer(x), atol=1e-6, rtol=0)


def spread_over_ranks(rank: int) -> None:
    whole = make()
    layer = parallelize(copy.deepcopy(whole), ParallelGroups.create(2, timeout=60))
    torch.manual_seed(rank)
    k = (torch.tensor([1, 4, 2]), torch.tensor([8, 1]))[rank]  # another largest k on each rank
    x, grad = torch.randn(2, len(k), L, D)
    want = results(whole, k, x, grad)
    got = results(layer, k, x, grad)
    for g, w in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-6)
    assert layer.top_k == 3


@pytest.mark.slow
def test_experts_spread_over_ranks():
    run_ranks(spread_over_ranks, 2)
