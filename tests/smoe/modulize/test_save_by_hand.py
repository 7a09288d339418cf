"""Models whose own code builds SMoE layers are saved, and load into a model that is built the same way."""

import copy

import pytest
import torch
from tiny_models import assert_same_model, inputs_of, tiny
from torch import nn

import smoe

pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")


def _by_hand(router="random", **options):
    torch.manual_seed(0)
    sizes = {"router": router, "seed": 0, "vocab_size": 9 if router == "hash" else None, **options}
    return nn.Sequential(nn.Linear(8, 8), smoe.SMoE(8, 32, 8, **sizes)).eval()


def _run(model, x):
    ids = torch.arange(len(x)) % 9
    return model[1](model[0](x), token_ids=ids)


@pytest.mark.parametrize("router", ["random", "learned", "hash"])
def test_layers_placed_by_hand(router, tmp_path):
    model, x = _by_hand(router, output_scale="num_experts", score="softmax_before_topk"), torch.randn(20, 8)
    smoe.set_top_k(model, 2)
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=_by_hand(router))
    assert smoe.get_top_k(loaded) == 2 and torch.equal(_run(loaded, x), _run(model, x))

    smoe.slim(model, {"1": torch.tensor([5.0, 1, 4, 0, 3, 2, 9, 8])}, keep=4)
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=_by_hand(router))
    assert smoe.get_top_k(loaded) == 2 and loaded[1].num_experts == 4 and loaded[1].scale == 8
    assert torch.equal(_run(loaded, x), _run(model, x))
    smoe.save_pretrained(loaded, tmp_path)
    assert torch.equal(_run(smoe.from_pretrained(tmp_path, model=_by_hand(router), top_k=3), x).isnan(), x.isnan())


def test_a_layer_alone(tmp_path):
    layer = smoe.SMoE(8, 32, 8, top_k=3, seed=0)
    smoe.save_pretrained(layer, tmp_path)
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path, model=smoe.SMoE(8, 32, 8, seed=1))) == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: _by_hand("learned"), "1 has the router 'learned'; it must be 'random', as it was saved"),
        (lambda: nn.Sequential(nn.Linear(8, 8), smoe.SMoE(8, 32, 4)), "1 has 4 experts; it must have 8 or more"),
        (lambda: nn.Sequential(smoe.SMoE(8, 32, 8)), "the record has an SMoE layer at 1, but Sequential has them at 0"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), smoe.SMoE(8, 64, 8)),
            r"1.experts.up has shape \(8, 4, 8\), it must be",
        ),
    ],
)
def test_other_layers_by_hand_are_refused_and_stay(other, message, tmp_path):
    smoe.save_pretrained(_by_hand(), tmp_path)
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        smoe.from_pretrained(tmp_path, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_by_hand_in_a_model_of_transformers_needs_that_model(tmp_path):
    def make():
        model = tiny("BERT")
        for i, layer in enumerate(model.bert.encoder.layer):
            layer.intermediate, layer.output.dense = smoe.SMoE(16, 64, 4, seed=i, activation="gelu"), nn.Identity()
        return model

    model = make()
    smoe.set_top_k(model, 2)
    smoe.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.intermediate; pass the model, as it was built"):
        smoe.from_pretrained(tmp_path)
    assert_same_model(model, smoe.from_pretrained(tmp_path, model=make().eval()), inputs_of(model))
