"""SMoE layers that a model's own code builds, in the same model as Transformers builds it."""

import copy

import pytest
import torch
import transformers
from tiny_models import inputs_of, logits_of, tiny
from torch import nn

import smoe
from smoe.dropout import Dropout
from smoe.methods import DenseMLP
from smoe.modulize.adopt import adopt_layers

pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")


def trained(kind, **options):
    """BERT whose MLPs are built by its own code."""
    model = tiny("BERT")
    for i, layer in enumerate(model.bert.encoder.layer):
        if kind == "dense":
            layer.intermediate = DenseMLP(16, 64, activation="gelu", dropout=Dropout(0.1))
        else:
            layer.intermediate = smoe.SMoE(16, 64, 4, **{"activation": "gelu", "seed": i, "top_k": 2, **options})
        layer.output.dense = nn.Identity()
    return model.eval()


@pytest.mark.parametrize("kind", ["experts", "learned", "dense", "slimmed"])
def test_the_same_model_saved_and_loaded(kind, tmp_path):
    source = trained(kind, router="learned" if kind == "learned" else "random")
    inputs = inputs_of(source)
    if kind == "slimmed":
        smoe.slim(source, smoe.vote(source, [inputs]), keep=3)
    expected = logits_of(source, **inputs)
    dense = transformers.BertForMaskedLM(tiny("BERT").config).eval()
    assert adopt_layers(dense, source) is dense
    assert torch.equal(logits_of(dense, **inputs), expected)
    smoe.save_pretrained(dense, tmp_path)
    loaded = smoe.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, **inputs), expected)
    if kind != "dense":
        smoe.demodulize(loaded)
    assert not smoe.smoe_layers(loaded)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: tiny("BERT"), "BertForMaskedLM has 0 MLPs, but BertForMaskedLM 2"),
        (lambda: trained("experts", activation="relu"), "intermediate has the activation relu; it must be gelu"),
        (lambda: trained("experts", bias=False), "first bias is False; it must be True"),
        (lambda: trained("experts", gated=True), "gate is True; it must be False"),
        (lambda: _renamed(trained("experts")), "cls.more.bias is a tensor of BertForMaskedLM alone"),
    ],
)
def test_another_model_changes_nothing(source, message):
    dense = tiny("BERT")
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=message):
        adopt_layers(dense, source())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def _renamed(model):
    model.cls.more = nn.Linear(2, 2)
    return model
