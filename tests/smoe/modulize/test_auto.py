"""Transformers' own ``from_pretrained``: right after ``import smoe.hf``, refused without."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import Sentences, inputs_of, logits_of, tiny

import smoe

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

import smoe.hf  # noqa: E402

AUTO = {
    "Llama": "AutoModelForCausalLM",
    "BERT": "AutoModelForMaskedLM",
    "GPT-2": "AutoModelForCausalLM",
    "ModernBERT": "AutoModelForMaskedLM",
    "T5": "AutoModelForSeq2SeqLM",
    "ALBERT": "AutoModelForMaskedLM",
    "ViT": "AutoModelForImageClassification",
    "DINOv2 giant": "AutoModelForImageClassification",
}


def saved(name, folder, **options):
    """A modulized model whose routers and biases matter, saved by Transformers itself."""
    model = smoe.modulize(tiny(name), 8, **{"seed": 1, "score": "sum", "top_k": 3, **options})
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def assert_same(model, loaded, **inputs):
    assert type(loaded) is type(model)
    assert not loaded.training and smoe.get_top_k(loaded) == smoe.get_top_k(model)
    state = loaded.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) and value.dtype == state[key].dtype, key
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded, **inputs), logits_of(model, **inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_load_it_right(name, tmp_path):
    model = saved(name, tmp_path)
    auto = getattr(transformers, AUTO[name])
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(model, loaded, **inputs_of(model))
    # It is a modulized model like any other, and knows nothing of how it was loaded.
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "again")
    assert_same(model, smoe.from_pretrained(tmp_path / "again"), **inputs_of(model))


def test_base_models_heads_and_slimmed_models(tmp_path):
    model = saved("BERT", tmp_path / "mlm", layers=[1])
    smoe.set_top_k(model, 2)
    smoe.slim(model, smoe.vote(model, [inputs_of(model)]), keep=5)
    model.save_pretrained(tmp_path / "slim")
    inputs = inputs_of(model)
    assert_same(model, transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "slim"), **inputs)
    base = transformers.AutoModel.from_pretrained(tmp_path / "slim", add_pooling_layer=False)
    assert torch.equal(base(**inputs)[0], model.bert(**inputs)[0])
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")
    assert torch.equal(headed.bert(**inputs)[0], model.bert(**inputs)[0])
    base.save_pretrained(tmp_path / "base")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    assert torch.equal(back.bert(**inputs)[0], model.bert(**inputs)[0])

    smoe.set_top_k(model, 5)
    smoe.demodulize(model).save_pretrained(tmp_path / "narrow")
    narrow = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "narrow")
    assert narrow.bert.encoder.layer[1].output.dense.in_features == 40
    assert torch.equal(logits_of(narrow, **inputs), logits_of(model, **inputs))


def test_shards(tmp_path):
    model = saved("Llama", tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert_same(model, loaded, **inputs_of(model))
    assert_same(model, smoe.from_pretrained(tmp_path / "shards"), **inputs_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_dtype(dtype, tmp_path):
    saved("Llama", tmp_path)
    model = smoe.from_pretrained(tmp_path, dtype=None if dtype == "auto" else dtype)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same(model, loaded, **inputs_of(model))
    assert smoe.smoe_layers(loaded)[0][1].router.weight.dtype == torch.float32


def test_a_model_that_keeps_its_last_layer_in_float32(tmp_path):
    model = saved("T5", tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert {layer.experts.down.dtype for _, layer in smoe.smoe_layers(loaded)} == {torch.float32}
    expected = logits_of(model, **inputs_of(model))
    torch.testing.assert_close(logits_of(loaded, **inputs_of(model)).float(), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    model = saved("Llama", tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert_same(model, loaded, **inputs_of(model))


def test_offloading_to_disk(tmp_path):
    model = saved("Llama", tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
    )
    inputs = inputs_of(model)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded, **inputs), logits_of(model, **inputs), atol=1e-5, rtol=0)


def test_the_meta_device_shows_the_shapes(tmp_path):
    model = saved("Llama", tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="meta")
    shapes = {name: (tensor.shape, tensor.device.type) for name, tensor in loaded.state_dict().items()}
    assert shapes == {name: (tensor.shape, "meta") for name, tensor in model.state_dict().items()}


def _trainer(model, folder, **options):
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": []}
    arguments |= {"disable_tqdm": True, "use_cpu": True, "seed": 0, **options}
    args = transformers.TrainingArguments(str(folder), **arguments)
    return transformers.Trainer(model, args, train_dataset=Sentences(16), eval_dataset=Sentences(16))


def test_trainer_saves_what_auto_classes_load_and_train_on(tmp_path):
    model = smoe.modulize(tiny("Llama"), 8, seed=0, top_k=2)
    trainer = _trainer(model, tmp_path / "run", save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model.eval()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(model, loaded, **inputs_of(model))
    before = loaded.state_dict()["lm_head.weight"].clone()
    _trainer(loaded, tmp_path / "on", save_strategy="no").train()
    assert not torch.equal(before, loaded.lm_head.weight) and smoe.get_top_k(loaded) == 2


@pytest.mark.parametrize("max_shard_size", [None, "20KB"])
def test_load_best_model_at_end(max_shard_size, tmp_path, monkeypatch, caplog):
    model = smoe.modulize(tiny("Llama"), 8, seed=0, top_k=2)
    if max_shard_size is not None:  # Trainer has no option for it
        save = type(model).save_pretrained
        monkeypatch.setattr(
            type(model), "save_pretrained", lambda self, *a, **k: save(self, *a, **k, max_shard_size=max_shard_size)
        )
    trainer = _trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first checkpoint is the best
    )
    with caplog.at_level("WARNING"):
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_propagation()
        trainer.train()
        transformers.logging.set_verbosity_error()
    if max_shard_size is None:  # of shards Transformers compares the names in the index
        assert not [record for record in caplog.records if "keys in the checkpoint" in record.getMessage()]
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    assert (best / "model.safetensors.index.json").exists() == (max_shard_size is not None)
    first = smoe.from_pretrained(best)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    last = smoe.from_pretrained(tmp_path / "checkpoint-4")
    assert not torch.equal(first.lm_head.weight, last.lm_head.weight)


WITHOUT = """
import sys
import transformers
sys.modules["smoe"] = None
for auto in sys.argv[2:]:
    try:
        getattr(transformers, auto).from_pretrained(sys.argv[1])
    except Exception as error:
        print(auto, type(error).__name__, file=sys.stderr)
"""


def test_without_the_import_it_is_refused_and_smoe_is_named(tmp_path):
    saved("Llama", tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    classes = ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel"]
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), *classes]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rest = done.stderr
    for name in classes:
        said, ended, rest = rest.partition(f"{name} RuntimeError\n")
        assert ended and "got smoe" in said and "down_proj.weight" in said, done.stderr


def test_models_without_experts_are_saved_as_ever(tmp_path):
    model = smoe.demodulize(smoe.modulize(tiny("Llama"), 8, score="sum"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and "smoe" not in config


def test_a_folder_of_an_earlier_version_loads_with_smoe(tmp_path):
    from safetensors.torch import load_file, save_file

    model = saved("Llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    assert [name for name, tensor in tensors.items() if tensor.shape == (1,)] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)
    ]
    save_file({n: t for n, t in tensors.items() if t.shape != (1,)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(model, smoe.from_pretrained(tmp_path), **inputs_of(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("smoe"), "quantization_config names smoe, but smoe records no layer"),
        (lambda config: config["smoe"].update(layers={}), "but smoe records no layer"),
        (lambda config: config["smoe"].update(version=9), "smoe.version is 9; this smoe reads 1 to 2"),
        (
            lambda config: config["smoe"].update(layers={"a.b": next(iter(config["smoe"]["layers"].values()))}),
            "the record has an MLP at a.b, but LlamaForCausalLM has them at model.layers.0.mlp.down_proj",
        ),
        (
            lambda config: config["smoe"].update(placed=config["smoe"]["layers"]),
            "is an SMoE layer that LlamaForCausalLM has no place for; use smoe.from_pretrained",
        ),
    ],
)
def test_a_damaged_record_is_one_line(change, message, tmp_path):
    saved("Llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as refused:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tensor", ["experts.up", "router.bias"])
def test_files_that_lack_a_part_of_a_layer_are_refused(tensor, tmp_path):
    """Transformers would warn and leave its memory as it finds it."""
    from safetensors.torch import load_file, save_file

    saved("Llama", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.down_proj.mlp.{tensor}"
    without = {key: value for key, value in whole.items() if key != name}
    for tensors in (without, {**without, name: whole[name][:-1].clone()}):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"the files hold no {name} of shape") as refused:
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
        assert "\n" not in str(refused.value)
