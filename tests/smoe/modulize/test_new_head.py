"""A pretrained model goes on under another head, or as both halves of an encoder-decoder."""

import copy

import pytest
import torch
import transformers
from tiny_models import inputs_of, tiny

import smoe

pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A masked language model, modulized and slimmed, and where it was saved."""
    model = smoe.modulize(tiny("BERT"), 8, top_k=2, layers=[1], output_scale="num_experts", seed=0)
    smoe.slim(model, smoe.vote(model, [inputs_of(model)]), keep=4)
    return model, smoe.save_pretrained(model, tmp_path_factory.mktemp("mlm"))


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "BertForMultipleChoice",
        "BertForQuestionAnswering",
        "BertForTokenClassification",
    ],
)
def test_another_head(pretrained, name):
    model, path = pretrained
    torch.manual_seed(1)
    fresh = getattr(transformers, name)(tiny("BERT").config)
    heads = {k: v.clone() for k, v in fresh.state_dict().items() if not k.startswith("bert.")}
    with pytest.warns(UserWarning, match=rf"{name} keeps its own .*; unused there: cls\.predictions"):
        loaded = smoe.from_pretrained(path, model=fresh)
    assert loaded is fresh and smoe.get_top_k(loaded) == 2 and smoe.smoe_layers(loaded)[0][1].scale == 8
    state = loaded.state_dict()
    for key, value in model.bert.state_dict().items():
        assert torch.equal(state[f"bert.{key}"], value)
    assert all(torch.equal(state[key], value) for key, value in heads.items())
    hidden = loaded.bert(**inputs_of(model)).last_hidden_state
    assert torch.equal(hidden, model.bert(**inputs_of(model)).last_hidden_state)


def test_the_base_alone_and_back_under_a_head(pretrained, tmp_path):
    model, path = pretrained
    with pytest.warns(UserWarning, match="BertModel keeps its own pooler.dense.weight, pooler.dense.bias"):
        base = smoe.from_pretrained(path, model=transformers.BertModel(tiny("BERT").config))
    smoe.save_pretrained(base, tmp_path)
    with pytest.warns(UserWarning, match="keeps its own classifier.weight, classifier.bias.*; unused there: nothing"):
        again = smoe.from_pretrained(tmp_path, model=_classifier())
    hidden = again.bert(**inputs_of(model)).last_hidden_state
    assert torch.equal(hidden, model.bert(**inputs_of(model)).last_hidden_state)


def _classifier():
    return transformers.BertForSequenceClassification(tiny("BERT").config)


def test_both_halves_of_an_encoder_decoder(pretrained, tmp_path):
    model, path = pretrained
    halves = [tiny("BERT").config for _ in range(2)]
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
    with pytest.warns(UserWarning, match="crossattention"):
        loaded = smoe.from_pretrained(path, model=transformers.EncoderDecoderModel(both))
    assert [name for name, _ in smoe.smoe_layers(loaded)] == [
        "encoder.encoder.layer.1.output.dense.mlp",
        "decoder.bert.encoder.layer.1.output.dense.mlp",
    ]
    inputs = inputs_of(model)
    hidden = model.bert(**inputs).last_hidden_state
    assert torch.equal(loaded.encoder(**inputs).last_hidden_state, hidden)
    state = loaded.state_dict()
    for key, value in model.cls.state_dict().items():  # the language model's head is the decoder's
        assert torch.equal(state[f"decoder.cls.{key}"], value), key
    for key, value in model.bert.encoder.state_dict().items():
        assert torch.equal(state[f"decoder.bert.encoder.{key}"], value), key
    # And it is a model like any other.
    smoe.save_pretrained(loaded, tmp_path)
    again = smoe.from_pretrained(tmp_path)
    ids = {"input_ids": inputs["input_ids"], "decoder_input_ids": inputs["input_ids"][:, :3]}
    assert torch.equal(again(**ids).logits, loaded(**ids).logits)


def test_t5_as_a_classifier_and_as_an_encoder(tmp_path):
    model = smoe.modulize(tiny("T5"), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    inputs = {"input_ids": inputs_of(model)["input_ids"]}
    hidden = model.encoder(**inputs).last_hidden_state
    with pytest.warns(UserWarning, match="T5EncoderModel keeps its own nothing.*unused there: decoder"):
        encoder = smoe.from_pretrained(tmp_path, model=transformers.T5EncoderModel(tiny("T5").config))
    assert len(smoe.smoe_layers(encoder)) == 1 and torch.equal(encoder(**inputs).last_hidden_state, hidden)
    with pytest.warns(UserWarning, match="keeps its own classification_head"):
        classifier = smoe.from_pretrained(tmp_path, model=transformers.T5ForSequenceClassification(tiny("T5").config))
    assert torch.equal(classifier.transformer.encoder(**inputs).last_hidden_state, hidden)


def test_a_dense_one_and_a_slimmed_dense_one(pretrained, tmp_path):
    model = tiny("BERT")
    smoe.save_pretrained(model, tmp_path / "dense")
    slimmed, _ = pretrained
    slimmed = smoe.demodulize(copy.deepcopy(slimmed))
    smoe.save_pretrained(slimmed, tmp_path / "slimmed")
    for name, source in (("dense", model), ("slimmed", slimmed)):
        with pytest.warns(UserWarning, match="keeps its own"):
            loaded = smoe.from_pretrained(tmp_path / name, model=_classifier())
        hidden = loaded.bert(**inputs_of(model)).last_hidden_state
        assert torch.equal(hidden, source.bert(**inputs_of(model)).last_hidden_state)


def test_what_does_not_fit_is_refused(pretrained):
    _, path = pretrained
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no part with the MLPs that were saved"):
        smoe.from_pretrained(path, model=tiny("GPT-2"))
    wide = transformers.BertForSequenceClassification(tiny("BERT", hidden_size=32).config)
    with pytest.raises(ValueError, match="don't fit BertForSequenceClassification: .* has shape"):
        smoe.from_pretrained(path, model=wide)
    assert not smoe.smoe_layers(wide)
    more = transformers.BertForSequenceClassification(tiny("BERT", num_hidden_layers=3).config)
    with pytest.warns(UserWarning, match="keeps its own bert.encoder.layer.2.*and"):  # deeper: its last layer is new
        smoe.from_pretrained(path, model=more)
