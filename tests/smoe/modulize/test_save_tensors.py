"""Saved tensors keep their dtypes, ties and names; what cannot be saved leaves the folder as it was."""

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_models import own_model, tiny
from torch import nn

import smoe

pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")


def test_every_weight_keeps_its_dtype(tmp_path):
    model = smoe.modulize(own_model().bfloat16(), 4, top_k=2, seed=0)
    model[2].mlp.experts.down.data = model[2].mlp.experts.down.data.float()
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=own_model())
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    whole = smoe.from_pretrained(tmp_path, model=own_model(), dtype=torch.float32)
    assert all(value.dtype == torch.float32 for value in whole.state_dict().values())
    with pytest.raises(ValueError, match="dtype is 'float16'; it must be a floating-point torch.dtype"):
        smoe.from_pretrained(tmp_path, model=own_model(), dtype="float16")


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
    model = smoe.modulize(own_model(), 4, top_k=2, seed=0)
    names = set(model.state_dict())
    inner = nn.Sequential(torch.compile(smoe.modulize(own_model(), 4, top_k=2, seed=0)))
    for wrapped, expected in (
        (nn.DataParallel(model), names),
        (torch.compile(model), names),
        (torch.optim.swa_utils.AveragedModel(model), names),
        (inner, {f"0.{name}" for name in names}),
    ):
        smoe.save_pretrained(wrapped, tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert set(file.keys()) == expected
        plain = own_model() if expected is names else nn.Sequential(own_model())
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
    model = smoe.modulize(own_model(), 4)
    spoil(model)
    with pytest.raises(ValueError, match=message):
        smoe.save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    model = smoe.modulize(own_model(), 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        smoe.save_pretrained(smoe.modulize(own_model(), 8), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_another_kind_of_model_in_the_same_folder(tmp_path):
    smoe.save_pretrained(smoe.modulize(own_model(), 4), tmp_path)
    smoe.save_pretrained(smoe.modulize(tiny("BERT"), 4, top_k=2), tmp_path)
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path)) == 2
    smoe.save_pretrained(smoe.modulize(own_model(), 4, top_k=3), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"smoe.json", "model.safetensors"}
    smoe.modulize(tiny("BERT"), 4, top_k=2).save_pretrained(tmp_path)
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path)) == 2
