"""A folder that is damaged, or holds absurd numbers, is one line of ValueError, at once."""

import json
import os
import re
import time

import pytest
import torch
from tiny_models import tiny
from torch import nn

import smoe

NAME = "bert.encoder.layer.0.output.dense"


@pytest.fixture
def folder(tmp_path):
    smoe.save_pretrained(smoe.modulize(tiny("BERT"), 4, top_k=2, seed=0), tmp_path)
    return tmp_path


def refusal(folder, **options):
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        smoe.from_pretrained(folder, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1500 and time.monotonic() - start < 20
    return message


def change(folder, *path, value=None, file="config.json"):
    settings = json.loads((folder / file).read_text())
    inner = settings
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (folder / file).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("smoe",), [1], r"config.json: smoe is \[1\]; it must be an object"),
        (("smoe", "version"), 3, "smoe.version is 3; this smoe reads 1 to 2"),
        (("smoe", "version"), True, "smoe.version is True"),
        (("smoe", "layers"), [], r"smoe.layers is \[\]; it must be an object"),
        (("smoe", "layers", NAME), 7, r"smoe.layers\['bert.*'\] is 7; it must be an object"),
        (("smoe", "layers", NAME, "top_k"), None, "has no top_k"),
        (("smoe", "layers", NAME, "top_k"), 5, "top_k is 5; it must be a whole number from 1 to num_experts = 4"),
        (("smoe", "layers", NAME, "top_k"), "2", "top_k is '2'; it must be a whole number"),
        (
            ("smoe", "layers", NAME, "num_experts"),
            8,
            r"experts.up has shape \(4, 16, 16\); by the record it must begin",
        ),
        (("smoe", "layers", NAME, "num_experts"), 3, "num_experts = 3 does not divide"),
        (("smoe", "layers", NAME, "d_hidden"), 2**30, "by the record it must begin with"),
        (("smoe", "layers", NAME, "d_hidden"), 10**30, "d_hidden is 1000.*; it must be a whole number from 1 to"),
        (("smoe", "layers", NAME, "router"), "hash", "a router 'hash' at bert.*; modulize can't build it"),
        (("smoe", "layers", NAME, "router"), ["random"], r"router is \['random'\]; it must be a name"),
        (("smoe", "layers", NAME, "score"), "softmax", "score is 'softmax'; it must be one of"),
        (("smoe", "layers", NAME, "output_scale"), -1, "output_scale is -1"),
        (("smoe", "layers", NAME, "output_scale"), float("inf"), "output_scale is inf; it must be"),
        (("smoe", "layers", NAME, "output_scale"), 10**400, "output_scale is 1000.*; it must be"),
        (("smoe", "layers", NAME, "output_scale"), float("nan"), "config.json is damaged: NaN is no number"),
        (("smoe", "layers", NAME, "dropout"), 1.5, "dropout is 1.5; it must be a rate"),
        (("smoe", "layers", NAME, "compute"), "magic", "compute is 'magic'"),
        (("smoe", "widths", NAME), 0, r"smoe.widths\['bert.*'\] is 0"),
        (("smoe", "widths"), {"nowhere": 4}, "the record has an MLP at nowhere, but BertForMaskedLM has them at bert"),
        (("smoe", "layers"), {}, "quantization_config names smoe, but smoe records no layer"),
        (("architectures",), ["x" * 9999], "names the architecture 'x.*x', which transformers lacks"),
        (("architectures",), ["Trainer"], "names the architecture Trainer, which transformers lacks"),
        (("architectures",), None, "architectures is None; it must name the class"),
        (("model_type",), "unheard", "describes no model that can be built"),
        (("hidden_size",), "wide", "describes no model that can be built"),
        (("hidden_size",), 10**9, r"has shape \(40, 1000000000\), but the weights hold \(40, 16\)"),
        (("intermediate_size",), 10**9, "describes a model of .* parameters, but the weights hold"),
        (("num_hidden_layers",), 10**9, "num_hidden_layers is 1000000000; with 46 tensors it must be at most 146"),
        (("num_labels",), 10**12, "num_labels is 1000000000000; with 46 tensors it must be at most 1000000"),
        (("num_hidden_layers",), 3, "16 are missing"),
    ],
)
def test_absurd_settings(folder, path, value, message):
    change(folder, *path, value=value)
    assert re.search(message, refusal(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json is damaged"),
        (b"\xff\xfe", "config.json is damaged"),
        (b'{"a": 1', "config.json is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"smoe":' * 100_000, "nested too deeply"),
        (b"1" * 5000, "config.json is damaged"),
        (b"[1]", "it must hold an object"),
    ],
)
def test_damaged_json(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


def test_json_of_gigabytes(folder):
    os.truncate(folder / "config.json", 1 << 32)  # a sparse file: takes no room
    assert "expected at most" in refusal(folder)


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (
        b"",
        whole[:5],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        b"\x80\x04pickle",
        whole[:8] + b"[" + whole[9:],
    ):
        weights.write_bytes(content)
        assert "model.safetensors is damaged" in refusal(folder)
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "holds no model.safetensors" in refusal(folder) and "pickles are not read" in refusal(folder)


def test_weights_of_another_shape_or_type(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.LayerNorm.weight"
    for value, message in (
        (torch.ones(17), "has shape (16,), but the weights hold (17,)"),
        (torch.ones(16, dtype=torch.int64), "holds no floating-point numbers"),
        (None, f"1 are missing ({name})"),
    ):
        changed = {k: v for k, v in tensors.items() if k != name} | ({} if value is None else {name: value})
        save_file(changed, folder / "model.safetensors")
        assert message in refusal(folder)
    save_file(tensors | {"more": torch.ones(2)}, folder / "model.safetensors")
    assert "1 have no place in it (more)" in refusal(folder)


def test_damaged_index(tmp_path):
    smoe.modulize(tiny("BERT"), 4, top_k=2).save_pretrained(tmp_path, max_shard_size="10KB")
    index = "model.safetensors.index.json"
    before = (tmp_path / index).read_text()
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    name = next(iter(json.loads(before)["weight_map"]))
    for value, message in (
        ({}, "weight_map is {}"),
        ({name: "../secret.safetensors"}, "it must be a safetensors file in the same folder"),
        ({name: "pytorch_model.bin"}, "it must be a safetensors file in the same folder"),
        ({name: "other.safetensors"}, "holds no other.safetensors"),
        ({name: 300 * "x" + ".safetensors"}, "holds no 'xxxxx"),
        ({name: first.name}, "are missing"),
    ):
        change(tmp_path, "weight_map", value=value, file=index)
        assert message in refusal(tmp_path).replace("no weight is called", "are missing")
    (tmp_path / index).write_text(before)
    smoe.save_pretrained(smoe.modulize(tiny("BERT"), 4), tmp_path / "one")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "one" / "model.safetensors").read_bytes())
    assert "holds both model.safetensors and model.safetensors.index.json" in refusal(tmp_path)


def test_a_refusal_leaves_the_model_as_it_was(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 2))

    smoe.save_pretrained(smoe.modulize(make(), 4), tmp_path)
    model = make()
    model[3] = nn.Linear(8, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "3.weight has shape (2, 8), it must be (3, 8)" in refusal(tmp_path, model=model)
    assert "top_k is 5" in refusal(tmp_path, model=make(), top_k=5)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "is modulized already; pass it dense" in refusal(tmp_path, model=smoe.modulize(make(), 4))
