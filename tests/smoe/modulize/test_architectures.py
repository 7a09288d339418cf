"""``modulize`` and ``demodulize`` on tiny random models of many Hugging Face architectures."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import MODELS, SPEECH, build, inputs_of, logits_of, tiny

import smoe

pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")

DOCS = Path(__file__).parents[3] / "docs" / "modulize.md"


@pytest.mark.parametrize("row", MODELS, ids=[row[0] for row in MODELS])
def test_same_logits_and_exact_way_back(row):
    _, _, model_class, settings, num_mlps, form = row
    model = build(model_class, settings)
    inputs = inputs_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [(name, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        logits = logits_of(model, **inputs)

        assert smoe.modulize(model, 4, score="sum", seed=0) is model
        layers = smoe.smoe_layers(model)
        assert len(layers) == num_mlps
        assert all(layer.experts.gated == ("gated" in form) for _, layer in layers)
        # Rates of 0.3 are the settings' own: whether it is a module or a number handed to a function, it is found.
        expected = 0.3 if 0.3 in settings.values() else 0.0
        assert all(layer.experts.dropout == pytest.approx(expected, abs=1e-3) for _, layer in layers)
        torch.testing.assert_close(logits_of(model, **inputs), logits, atol=1e-5, rtol=1e-5)

        smoe.set_top_k(model, 2)
        assert not torch.allclose(logits_of(model, **inputs), logits, atol=1e-6)  # the experts are what runs

    smoe.demodulize(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [(name, type(module)) for name, module in model.named_modules()] == classes
    with torch.no_grad():
        assert torch.equal(logits_of(model, **inputs), logits)


def test_the_table_in_the_docs_is_this_list():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `(.+?)` \| (.+?) \|$", DOCS.read_text(), flags=re.M)
    assert rows == [(name, kind, model_class, form) for name, kind, model_class, _, _, form in MODELS]


def test_there_is_a_choice_of_every_kind():
    kinds = [row[1] for row in MODELS]
    assert len(kinds) >= 20
    assert {"encoder", "decoder", "encoder-decoder", "vision", "audio"} <= set(kinds)


@pytest.mark.parametrize("name", ["BERT", "BART", "GPT-2", "Llama", "ALBERT", "ModernBERT"])
def test_training_reaches_experts_and_comes_back_with_them(name):
    model = tiny(name).train()
    inputs = inputs_of(model)
    smoe.modulize(model, 4, top_k=2, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert any("experts.up" in n for n in before) and not any("router" in n for n in before)
    for _ in range(3):
        logits_of(model, **inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all(n in moved for n in before if "experts" in n)

    smoe.set_top_k(model, 4)
    for _, layer in smoe.smoe_layers(model):
        layer.router.score = "sum"
    with torch.no_grad():
        trained = logits_of(model.eval(), **inputs)
        torch.testing.assert_close(logits_of(smoe.demodulize(model), **inputs), trained, atol=1e-5, rtol=1e-5)


def test_chunked_feed_forward():
    model, chunked = tiny("BERT"), tiny("BERT", chunk_size_feed_forward=2)
    inputs = inputs_of(model)
    smoe.modulize(chunked, 4, score="sum")
    assert chunked.bert.encoder.layer[0].chunk_size_feed_forward == 2
    with torch.no_grad():
        torch.testing.assert_close(logits_of(chunked, **inputs), logits_of(model, **inputs), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    models = [smoe.modulize(tiny("BERT"), 4, top_k=2, seed=0) for _ in range(2)]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        logits_of(model.train(), **inputs_of(model)).square().sum().backward()
    for (name, a), (_, b) in zip(*[model.named_parameters() for model in models], strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_bfloat16_and_mixed_dtypes_come_back():
    model = build("T5ForConditionalGeneration", dict(next(r for r in MODELS if r[0] == "T5 v1.1")[3])).bfloat16()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()  # as the library does on loading
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smoe.modulize(model, 4, score="sum")
    inputs = inputs_of(model)
    with torch.no_grad():
        assert logits_of(model, **inputs).isfinite().all()
    after = smoe.demodulize(model).state_dict()
    assert all(torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in before)


@pytest.mark.parametrize("name", ["T5", "T5 v1.1"])
@pytest.mark.parametrize("compute", ["auto", "reference"])
def test_a_large_output_does_not_overflow_in_float16(name, compute, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    mlp = model.encoder.block[0].layer[1].DenseReluDense.eval()
    assert mlp.wo.weight.dtype == torch.float32  # the library's own precaution
    x = torch.full((1, 3, 16), 4.0, dtype=torch.float16)
    with torch.no_grad():
        for linear in [m for m in mlp.children() if isinstance(m, torch.nn.Linear)]:
            linear.weight.fill_(1.0)
        mlp.wo.weight.fill_(100.0)
        dense = mlp(x)
        assert dense.dtype == torch.float32 and dense.max() > torch.finfo(torch.float16).max
        smoe.modulize(model, 4, score="sum", compute=compute)
        experts = mlp(x)
    assert experts.dtype == torch.float32
    torch.testing.assert_close(experts, dense, rtol=1e-3, atol=0)
    loss = mlp.train()(x.requires_grad_()).sum()  # with dropout
    loss.backward()
    layer = smoe.smoe_layers(model)[0][1]
    assert layer.experts.up.grad.dtype == torch.float16 and layer.experts.down.grad.dtype == torch.float32


def test_a_cast_in_between_comes_back_with_it():
    model = smoe.modulize(tiny("BERT"), 4).bfloat16()
    assert {p.dtype for p in smoe.demodulize(model).parameters()} == {torch.bfloat16}
    assert logits_of(model, **inputs_of(model)).dtype == torch.bfloat16


def test_what_it_cannot_know_is_named_and_left_as_it_was():
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "intermediate_size": 32}
    model = build("MambaForCausalLM", settings)
    before = str(model)
    with pytest.raises(ValueError, match=r"backbone\.layers\.0\.mixer \(MambaMixer\)"):
        smoe.modulize(model, 4)
    assert str(model) == before


def test_speech_without_mlps_in_its_feature_extractor():
    model = build("Wav2Vec2Model", SPEECH)
    smoe.modulize(model, 4, layers=[1])
    assert [name for name, _ in smoe.smoe_layers(model)] == ["encoder.layers.1.feed_forward.output_dense.mlp"]
