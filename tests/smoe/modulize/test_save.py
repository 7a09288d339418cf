"""What is saved loads again: the same model, at the k that it had."""

import copy
import json

import pytest
import torch
import transformers
from tiny_models import inputs_of, logits_of, tiny
from torch import nn

import smoe

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")


def _assert_same(a, b, inputs):
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(b.state_dict()[k], v) for k, v in a.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits_of(a, **inputs), logits_of(b, **inputs))


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "BART", "Llama", "T5 v1.1", "ALBERT", "ViT", "ModernBERT", "GPT-J"])
def test_round_trip(name, tmp_path):
    model = tiny(name)
    smoe.modulize(model, 4, layers=[0], top_k=3, output_scale=2.0, seed=0)
    assert smoe.save_pretrained(model, tmp_path) == tmp_path
    names = {file.name for file in tmp_path.iterdir()}
    assert names <= {"config.json", "generation_config.json", "model.safetensors"} and "model.safetensors" in names
    record = json.loads((tmp_path / "config.json").read_text())["smoe"]
    assert len(record["layers"]) == 1

    torch.manual_seed(7)
    loaded = smoe.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert smoe.get_top_k(loaded) == 3 and smoe.smoe_layers(loaded)[0][1].output_scale == 2.0
    _assert_same(model, loaded, inputs_of(model))
    smoe.demodulize(model)
    _assert_same(model, smoe.demodulize(loaded), inputs_of(model))


@pytest.mark.parametrize("router", ["random", "learned", "uniform"])
def test_round_trip_of_every_router(router, tmp_path):
    model = smoe.modulize(tiny("BERT"), 4, top_k=2, router=router, score="softmax_before_topk", seed=0)
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, top_k=4)
    layer = smoe.smoe_layers(loaded)[0][1]
    assert type(layer.router) is type(smoe.smoe_layers(model)[0][1].router)
    assert layer.router.score == "softmax_before_topk" and smoe.get_top_k(loaded) == 4
    smoe.set_top_k(model, 4)
    _assert_same(model, loaded, inputs_of(model))


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
    _assert_same(model, loaded, inputs)
    # And the copy can be saved again.
    smoe.save_pretrained(loaded, tmp_path / "again")
    _assert_same(model, smoe.from_pretrained(tmp_path / "again"), inputs)
    if dense:
        smoe.modulize(loaded, 4)


def test_back_to_dense_needs_nothing_of_ours(tmp_path):
    model = tiny("BERT")
    smoe.demodulize(smoe.modulize(model, 4))
    smoe.save_pretrained(model, tmp_path)
    assert "smoe" not in json.loads((tmp_path / "config.json").read_text())
    _assert_same(model, transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), inputs_of(model))
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_their_save_pretrained_is_enough(tmp_path):
    # What a Trainer writes as a checkpoint.
    model = smoe.modulize(tiny("BERT"), 4, top_k=2, seed=0)
    model.save_pretrained(tmp_path)
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_modulized_part_of_atiny(tmp_path):
    model = tiny("BERT")
    smoe.modulize(model.bert, 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_dtype(tmp_path):
    model = smoe.modulize(tiny("BERT").bfloat16(), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert smoe.smoe_layers(loaded)[0][1].experts.up.dtype == torch.bfloat16
    _assert_same(model, loaded, inputs_of(model))


def _own():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def test_model_of_your_own(tmp_path):
    model, x = smoe.modulize(_own(), 4, top_k=2, seed=0), torch.randn(3, 8)
    smoe.save_pretrained(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"smoe.json", "model.safetensors"}
    with pytest.raises(ValueError, match="was saved from a model of your own; pass it"):
        smoe.from_pretrained(tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=_own())
    assert torch.equal(loaded(x), model(x))


def test_wrong_folder_ortiny(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        smoe.from_pretrained(tmp_path)
    smoe.save_pretrained(smoe.modulize(_own(), 4), tmp_path)
    with pytest.raises(ValueError, match="the record has an MLP at 2, but Sequential has them at 0.2"):
        smoe.from_pretrained(tmp_path, model=nn.Sequential(_own()))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file; it must be a folder"):
        smoe.save_pretrained(_own(), tmp_path / "file")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        smoe.from_pretrained(tmp_path, model=_own())


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
        _assert_same(part, loaded, inputs_of(model))


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
        _assert_same(model, smoe.from_pretrained(tmp_path / name), inputs_of(model))
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
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))
    # Saving in one file leaves nothing of the many.
    smoe.set_top_k(model, 3)
    smoe.save_pretrained(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} - {"generation_config.json"} == {
        "config.json",
        "model.safetensors",
    }
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))


@pytest.mark.parametrize("name", ["ViT", "Swin", "AST", "GPT-NeoX"])
def test_architectures_that_transformers_saves_under_other_names(name, tmp_path):
    model = smoe.modulize(tiny(name), 4, top_k=2, seed=0)
    model.save_pretrained(tmp_path / "experts")
    _assert_same(model, smoe.from_pretrained(tmp_path / "experts"), inputs_of(model))
    smoe.demodulize(model).save_pretrained(tmp_path / "dense")
    _assert_same(model, smoe.from_pretrained(tmp_path / "dense"), inputs_of(model))


def test_what_the_constructor_was_told(tmp_path):
    model = transformers.BertModel(tiny("BERT").config, add_pooling_layer=False).eval()
    smoe.modulize(model, 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path / "experts")
    _assert_same(model, smoe.from_pretrained(tmp_path / "experts"), inputs_of(tiny("BERT")))
    smoe.save_pretrained(smoe.demodulize(model), tmp_path / "dense")
    _assert_same(model, smoe.from_pretrained(tmp_path / "dense"), inputs_of(tiny("BERT")))


# Models whose own code builds SMoE layers.


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
    _assert_same(model, smoe.from_pretrained(tmp_path, model=make().eval()), inputs_of(model))


# Tensors: dtypes, ties, wrappers.


def test_every_weight_keeps_its_dtype(tmp_path):
    model = smoe.modulize(_own().bfloat16(), 4, top_k=2, seed=0)
    model[2].mlp.experts.down.data = model[2].mlp.experts.down.data.float()
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=_own())
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    whole = smoe.from_pretrained(tmp_path, model=_own(), dtype=torch.float32)
    assert all(value.dtype == torch.float32 for value in whole.state_dict().values())
    with pytest.raises(ValueError, match="dtype is 'float16'; it must be a floating-point torch.dtype"):
        smoe.from_pretrained(tmp_path, model=_own(), dtype="float16")


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("save", ["smoe", "transformers"])
def test_t5_keeps_its_last_layers_in_float32(save, dtype, tmp_path):
    tiny("T5 v1.1").save_pretrained(tmp_path / "dense")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    smoe.modulize(model, 4, score="sum")
    smoe.save_pretrained(model, tmp_path) if save == "smoe" else model.save_pretrained(tmp_path)
    for _, layer in smoe.smoe_layers(smoe.from_pretrained(tmp_path, dtype=dtype)):
        assert (layer.experts.up.dtype, layer.experts.down.dtype) == (torch.float16, torch.float32)


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.again = self.mlp
        self.register_buffer("row", self.embed.weight.detach()[:1])  # a view

    def forward(self, ids):
        return self.head(self.again(self.mlp(self.embed(ids))))


def test_tied_weights_shared_modules_and_views(tmp_path):
    model = _Tied().eval()
    smoe.modulize(model, 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    fresh = _Tied()
    with torch.no_grad():
        fresh.embed.weight.zero_()
    loaded = smoe.from_pretrained(tmp_path, model=fresh)
    assert loaded.head.weight is loaded.embed.weight and loaded.mlp is loaded.again
    ids = torch.arange(9)
    assert torch.equal(loaded(ids), model(ids)) and torch.equal(loaded.row, model.row)


def test_wrappers_are_looked_through(tmp_path):
    model = smoe.modulize(_own(), 4, top_k=2, seed=0)
    names = set(model.state_dict())
    from safetensors import safe_open

    inner = nn.Sequential(torch.compile(smoe.modulize(_own(), 4, top_k=2, seed=0)))
    for wrapped, expected in (
        (nn.DataParallel(model), names),
        (torch.compile(model), names),
        (torch.optim.swa_utils.AveragedModel(model), names),
        (inner, {f"0.{name}" for name in names}),
    ):
        smoe.save_pretrained(wrapped, tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert set(file.keys()) == expected
        plain = _own() if expected is names else nn.Sequential(_own())
        loaded = smoe.from_pretrained(tmp_path, model=torch.compile(plain))
        assert smoe.get_top_k(loaded) == 2 and not loaded.training


class PeftLike(nn.Module):
    pass


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.to("meta"), "0.weight is on the meta device|2.mlp.* is on the meta device"),
        (lambda model: model.add_module("adapter", PeftLike()), "adapter is a PeftLike of PEFT; call merge_and_unload"),
        (lambda model: model.register_buffer("odd", torch.eye(2).to_sparse()), "odd is a torch.sparse_coo tensor"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(spoil, message, tmp_path, monkeypatch):
    monkeypatch.setattr(PeftLike, "__module__", "peft.tuners.lora")
    model = smoe.modulize(_own(), 4)
    spoil(model)
    with pytest.raises(ValueError, match=message):
        smoe.save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    model = smoe.modulize(_own(), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        smoe.save_pretrained(smoe.modulize(_own(), 8), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_another_kind_of_model_in_the_same_folder(tmp_path):
    smoe.save_pretrained(smoe.modulize(_own(), 4), tmp_path)
    smoe.save_pretrained(smoe.modulize(tiny("BERT"), 4, top_k=2), tmp_path)
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path)) == 2
    smoe.save_pretrained(smoe.modulize(_own(), 4, top_k=3), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"smoe.json", "model.safetensors"}
    smoe.modulize(tiny("BERT"), 4, top_k=2).save_pretrained(tmp_path)
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path)) == 2


def test_a_record_of_the_first_version(tmp_path):
    model = smoe.modulize(tiny("BERT"), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["smoe"]["version"] = 1
    del settings["smoe"]["placed"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))
