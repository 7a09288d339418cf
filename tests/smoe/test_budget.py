"""The k of every layer for a budget of FLOPs."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smoe import SMoE, activated, fit_budget, get_top_k, set_top_k
from smoe.flops import count

D, N = 8, 4


class Model(nn.Module):
    """SMoE layers one after the other; ``loss`` is how far k experts are from all of them."""

    def __init__(self, sizes=(N, N, N), hidden=32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(SMoE(D, hidden, n, output_scale="num_experts", seed=n) for n in sizes)
        for i, layer in enumerate(self.layers):  # the later, the more it matters
            layer.experts.reset_parameters(0.2 * (i + 1))
            layer.dropout = nn.Dropout(0.5)  # a loss in training mode would be another one

    def forward(self, x, target=None):
        for layer in self.layers:
            x = x + layer.dropout(layer(x))
        return SimpleNamespace(loss=None if target is None else (x - target).square().mean(), output=x)


def batches_for(model):
    inputs = torch.randn(2, 5, 6, D)
    with torch.no_grad(), activated(model.eval(), [layer.num_experts for layer in model.layers]):
        return [{"x": x, "target": model(x).output} for x in inputs]


def test_it_is_the_best_of_all_that_fit():
    """Where every expert more helps less than the one before, trading one at a time finds it."""
    model, x = Model(), torch.randn(3, D)
    importance = torch.tensor([1.0, 6.0, 2.5])

    def loss(output, batch):
        return (importance / torch.tensor([layer.top_k for layer in model.layers])).sum()

    for k in range(1, N + 1):
        budget = count(model, x, k).true
        every = [ks for ks in itertools.product(range(1, N + 1), repeat=3) if count(model, x, ks).true <= budget]
        best = min(every, key=lambda ks: float((importance / torch.tensor(ks)).sum()))
        assert fit_budget(model, [x], flops=budget, loss=loss) == list(best)


def test_it_keeps_to_the_budget_and_is_no_worse_than_one_k():
    model = Model(sizes=(4, 8, 2), hidden=48)
    batches = batches_for(model)
    better = 0
    for k in (1, 2, 3, 5):
        budget = count(model, batches[0], [min(k, layer.num_experts) for layer in model.layers]).true
        ks = fit_budget(model, batches, flops=budget)
        assert count(model, batches[0], ks).true <= budget
        losses = []
        for choice in (ks, [min(k, layer.num_experts) for layer in model.layers]):
            with torch.no_grad(), activated(model.eval(), choice):
                losses.append(sum(float(model(**batch).loss) for batch in batches))
        assert losses[0] <= losses[1]
        better += losses[0] < losses[1]
    assert better >= 2


def test_the_model_stays_as_it_is():
    model = Model()
    batches = batches_for(model)
    set_top_k(model, [1, 3, 2])
    model.train()
    model.layers[1].eval()
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    flops, modes = count(model, batches[0], 2).true, []
    model.layers[2].register_forward_hook(lambda layer, *_: modes.append(layer.training or layer.dropout.training))
    ks = fit_budget(model, batches, flops=flops)
    assert modes and not any(modes)
    assert get_top_k(model) == [1, 3, 2] and ks != [1, 3, 2]
    assert model.training and not model.layers[1].training and model.layers[2].dropout.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_batches_are_what_the_model_is_called_with():
    model = Model()
    batches = batches_for(model)
    flops = count(model, batches[0], 2).true
    want = fit_budget(model, batches, flops=flops)
    assert fit_budget(model, ((b["x"], b["target"]) for b in batches), flops=flops) == want
    assert fit_budget(model, [[b["x"], b["target"]] for b in batches], flops=flops) == want
    targets = {id(b["x"]): b["target"] for b in batches}
    own = fit_budget(
        model,
        [b["x"] for b in batches],
        flops=flops,
        loss=lambda output, x: (output.output - targets[id(x)]).square().mean(),
    )
    assert own == want
    assert fit_budget(torch.compile(model), batches, flops=flops) == want


def test_a_router_that_draws_is_measured_with_the_same_draws():
    model = nn.Sequential(SMoE(D, 32, N, router="uniform"), SMoE(D, 32, N, router="uniform"))
    x = torch.randn(20, D)
    loss = lambda output, batch: output.square().mean()  # noqa: E731
    flops = count(model, x, 2).true
    assert fit_budget(model, [x], flops=flops, loss=loss) == fit_budget(model, [x], flops=flops, loss=loss)


def test_mistakes():
    model, x = Model(), torch.randn(3, D)
    least = count(model, x, 1).true
    for arguments, words in (
        ((model, [x], least - 1), f"flops is {least - 1}; a pass with one expert per layer costs {least}"),
        ((model, [x], float("nan")), "flops is nan"),
        ((model, [], least), "batches is empty"),
        ((nn.Linear(D, D), [x], least), "Linear has no SMoE layer"),
        ((model, [x], 2 * least), "SimpleNamespace has no loss; give batches with labels, or loss="),
    ):
        with pytest.raises(ValueError, match=words):
            fit_budget(*arguments[:2], flops=arguments[2])
