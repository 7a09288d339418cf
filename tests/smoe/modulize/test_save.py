"""What is saved loads again: the same model, at the k that it had."""

import json

import pytest
import torch
import transformers
from tiny_models import assert_same_model, inputs_of, own_model, tiny
from torch import nn

import smoe

pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "BART", "Llama", "T5 v1.1", "ALBERT", "ViT", "ModernBERT", "GPT-J"])
def test_round_trip(name, tmp_path):
    model = tiny(name)
    smoe.modulize(model, 4, layers=[0], top_k=3, output_scale=2.0, seed=0)
    assert smoe.save_pretrained(model, tmp_path) == tmp_path
    names = {file.name for file in tmp_path.iterdir()}
    assert names - {"generation_config.json"} == {"config.json", "model.safetensors", "README.md"}
    record = json.loads((tmp_path / "config.json").read_text())["smoe"]
    assert len(record["layers"]) == 1

    torch.manual_seed(7)
    loaded = smoe.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert smoe.get_top_k(loaded) == 3 and smoe.smoe_layers(loaded)[0][1].output_scale == 2.0
    assert_same_model(model, loaded, inputs_of(model))
    smoe.demodulize(model)
    assert_same_model(model, smoe.demodulize(loaded), inputs_of(model))


@pytest.mark.parametrize("router", ["random", "learned", "uniform"])
def test_round_trip_of_every_router(router, tmp_path):
    model = smoe.modulize(tiny("BERT"), 4, top_k=2, router=router, score="softmax_before_topk", seed=0)
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, top_k=4)
    layer = smoe.smoe_layers(loaded)[0][1]
    assert type(layer.router) is type(smoe.smoe_layers(model)[0][1].router)
    assert layer.router.score == "softmax_before_topk" and smoe.get_top_k(loaded) == 4
    smoe.set_top_k(model, 4)
    assert_same_model(model, loaded, inputs_of(model))


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ModernBERT"])
@pytest.mark.parametrize("dense", [False, True])
def test_round_trip_of_slimmed(name, dense, tmp_path):
    model = tiny(name)
    inputs = inputs_of(model)
    smoe.modulize(model, 8, top_k=2, layers=[1], seed=0)
    smoe.slim(model, smoe.vote(model, [inputs]), keep=4)
    if dense:
        smoe.demodulize(model)
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path)
    assert_same_model(model, loaded, inputs)
    # And the copy can be saved again.
    smoe.save_pretrained(loaded, tmp_path / "again")
    assert_same_model(model, smoe.from_pretrained(tmp_path / "again"), inputs)
    if dense:
        smoe.modulize(loaded, 4)


def test_back_to_dense_needs_nothing_of_ours(tmp_path):
    model = tiny("BERT")
    smoe.demodulize(smoe.modulize(model, 4))
    smoe.save_pretrained(model, tmp_path)
    assert "smoe" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_model(model, transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), inputs_of(model))
    assert_same_model(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_their_save_pretrained_is_enough(tmp_path):
    # What a Trainer writes as a checkpoint.
    model = smoe.modulize(tiny("BERT"), 4, top_k=2, seed=0)
    model.save_pretrained(tmp_path)
    assert_same_model(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_modulized_part_of_a_model(tmp_path):
    model = tiny("BERT")
    smoe.modulize(model.bert, 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    assert_same_model(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_dtype(tmp_path):
    model = smoe.modulize(tiny("BERT").bfloat16(), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert smoe.smoe_layers(loaded)[0][1].experts.up.dtype == torch.bfloat16
    assert_same_model(model, loaded, inputs_of(model))


def test_model_of_your_own(tmp_path):
    model, x = smoe.modulize(own_model(), 4, top_k=2, seed=0), torch.randn(3, 8)
    smoe.save_pretrained(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"smoe.json", "model.safetensors"}
    with pytest.raises(ValueError, match="was saved from a model of your own; pass it"):
        smoe.from_pretrained(tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=own_model())
    assert torch.equal(loaded(x), model(x))


def test_wrong_folder_or_model(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        smoe.from_pretrained(tmp_path)
    smoe.save_pretrained(smoe.modulize(own_model(), 4), tmp_path)
    with pytest.raises(ValueError, match="the record has an MLP at 2, but Sequential has them at 0.2"):
        smoe.from_pretrained(tmp_path, model=nn.Sequential(own_model()))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file; it must be a folder"):
        smoe.save_pretrained(own_model(), tmp_path / "file")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        smoe.from_pretrained(tmp_path, model=own_model())


# What is written is the model that is saved, as it is at that moment.


def test_their_save_pretrained_writes_k_as_it_is_now(tmp_path):
    model = smoe.modulize(tiny("BERT"), 4, seed=0)
    smoe.set_top_k(model, [3, 1])
    model.save_pretrained(tmp_path)
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path)) == [3, 1]
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path, top_k=[2, 4])) == [2, 4]
    assert not hasattr(model.config, "smoe")


@pytest.mark.parametrize("save", ["smoe", "transformers"])
@pytest.mark.parametrize("modulized", ["head", "base"])
def test_a_part_and_the_whole_load_by_their_own_names(modulized, save, tmp_path):
    model = tiny("BERT")
    smoe.modulize(model if modulized == "head" else model.bert, 4, top_k=2, seed=0)
    for part, folder in ((model, tmp_path / "head"), (model.bert, tmp_path / "base")):
        smoe.save_pretrained(part, folder) if save == "smoe" else part.save_pretrained(folder)
        loaded = smoe.from_pretrained(folder)
        assert type(loaded) is type(part)
        assert_same_model(part, loaded, inputs_of(model))


def test_a_part_that_is_no_model_of_transformers(tmp_path):
    model = tiny("BERT")
    smoe.modulize(model, 4, top_k=2, seed=0)
    smoe.save_pretrained(model.bert.encoder, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=tiny("BERT").bert.encoder)
    x = torch.randn(1, 3, 16)
    assert torch.equal(loaded(x)[0], model.bert.encoder(x)[0]) and smoe.get_top_k(loaded) == 2


def test_models_that_share_one_config(tmp_path):
    config = tiny("BERT").config
    dense, first, second = (transformers.BertForMaskedLM(config).eval() for _ in range(3))
    smoe.modulize(first, 4, top_k=1, seed=0)
    smoe.modulize(second, 8, top_k=7, score="sum", layers=[1])
    for name, model in (("first", first), ("dense", dense), ("second", second)):
        model.save_pretrained(tmp_path / name)
    for name, model in (("first", first), ("dense", dense), ("second", second)):
        assert_same_model(model, smoe.from_pretrained(tmp_path / name), inputs_of(model))
    assert "smoe" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_dense_model_from_the_config_of_a_modulized_one(tmp_path):
    smoe.save_pretrained(smoe.modulize(tiny("BERT"), 4), tmp_path / "a")
    dense = transformers.BertForMaskedLM(transformers.AutoConfig.from_pretrained(tmp_path / "a"))
    dense.save_pretrained(tmp_path / "b")
    assert not smoe.smoe_layers(smoe.from_pretrained(tmp_path / "b"))


@pytest.mark.parametrize("name", ["BERT", "BART"])  # BART ties its embeddings
def test_several_files(name, tmp_path):
    model = smoe.modulize(tiny(name), 4, top_k=2, seed=0)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_model(model, smoe.from_pretrained(tmp_path), inputs_of(model))
    # Saving in one file leaves nothing of the many.
    smoe.set_top_k(model, 3)
    smoe.save_pretrained(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} - {"generation_config.json"} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert_same_model(model, smoe.from_pretrained(tmp_path), inputs_of(model))


@pytest.mark.parametrize("name", ["ViT", "Swin", "AST", "GPT-NeoX"])
def test_architectures_that_transformers_saves_under_other_names(name, tmp_path):
    model = smoe.modulize(tiny(name), 4, top_k=2, seed=0)
    model.save_pretrained(tmp_path / "experts")
    assert_same_model(model, smoe.from_pretrained(tmp_path / "experts"), inputs_of(model))
    smoe.demodulize(model).save_pretrained(tmp_path / "dense")
    assert_same_model(model, smoe.from_pretrained(tmp_path / "dense"), inputs_of(model))


def test_what_the_constructor_was_told(tmp_path):
    model = transformers.BertModel(tiny("BERT").config, add_pooling_layer=False).eval()
    smoe.modulize(model, 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path / "experts")
    assert_same_model(model, smoe.from_pretrained(tmp_path / "experts"), inputs_of(tiny("BERT")))
    smoe.save_pretrained(smoe.demodulize(model), tmp_path / "dense")
    assert_same_model(model, smoe.from_pretrained(tmp_path / "dense"), inputs_of(tiny("BERT")))


def test_a_record_of_the_first_version(tmp_path):
    model = smoe.modulize(tiny("BERT"), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["smoe"]["version"] = 1
    del settings["smoe"]["placed"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_same_model(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_the_tokenizer_is_saved_too(tmp_path):
    from examples import byte_tokenizer

    byte_tokenizer.save(tmp_path)
    model = smoe.modulize(tiny("Llama"), 8)
    smoe.save_pretrained(model, tmp_path / "without")
    smoe.save_pretrained(model, tmp_path / "given", tokenizer=tmp_path)
    again = smoe.from_pretrained(tmp_path / "given")
    smoe.save_pretrained(again, tmp_path / "again")  # it is that of the folder that the model came from
    assert not list((tmp_path / "without").glob("tokenizer*"))
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match="a folder without a tokenizer's files"):
        smoe.save_pretrained(model, tmp_path / "refused", tokenizer=tmp_path / "without")
    assert not list((tmp_path / "refused").glob("*"))


def test_a_card_says_how_to_load_it_and_what_each_k_uses(tmp_path):
    model = smoe.modulize(tiny("Llama"), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    whole = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for _, layer in smoe.smoe_layers(model) for p in layer.experts.parameters())
    for k in (1, 2, 3, 4):
        assert f"| {k} | {whole - experts * (4 - k) // 4:,} |" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"folder"', "folder")
    names = {"folder": str(tmp_path)}
    exec(code, names)
    assert smoe.get_top_k(names["model"]) == 2
    assert_same_model(model, names["model"], inputs_of(model))

    # Saved again as another model: without experts no card, and never in place of somebody else's.
    smoe.save_pretrained(smoe.demodulize(smoe.modulize(tiny("Llama"), 4, score="sum")), tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("mine")
    smoe.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


class Mine(transformers.LlamaForCausalLM):
    """An architecture that Transformers does not have."""


def test_a_card_of_a_model_of_your_own_with_k_per_layer(tmp_path):
    model = smoe.modulize(Mine(tiny("Llama").config), [4, 8], top_k=[1, 8], seed=0)
    model.name_or_path = "somebody/model"
    smoe.save_pretrained(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"from {__name__} import Mine" in card and "smoe.set_top_k(model, [1, 8])" in card
    assert "| 4 |" in card and "| 5 |" not in card  # set_top_k(model, 5) is refused
    assert "base_model" not in card  # it came from no hub
    model.config._commit_hash = "0" * 40
    smoe.save_pretrained(model, tmp_path)
    assert "base_model: somebody/model\n" in (tmp_path / "README.md").read_text()


def test_the_card_of_an_export_is_replaced(tmp_path):
    from smoe.export import to_hf

    model = smoe.modulize(tiny("Llama"), 4, seed=0)
    to_hf(model, tmp_path)
    smoe.save_pretrained(model, tmp_path)
    assert "Mixtral" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    to_hf(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_nothing_is_left_where_the_tokenizer_is_none(tmp_path):
    with pytest.raises(ValueError, match="without a tokenizer's files"):
        smoe.save_pretrained(smoe.modulize(tiny("Llama"), 4), tmp_path / "new", tokenizer=tmp_path)
    assert not (tmp_path / "new").exists()
