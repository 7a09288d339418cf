"""Training that starts from a Hugging Face folder."""

import json
import shutil

import pytest
import torch
from runs import assert_one_line, result

import smoe
from bert.config import PretrainConfig
from bert.pretrain import MaskedLanguageModel
from smoe.train.command import parse_config


def task(prepared, model, method, folder, **options):
    flags = ["--method", method, "--data", prepared(model), "--run_dir", "unused", "--scale", "smoke"]
    flags += ["--start_from", folder, *(word for name, value in options.items() for word in (f"--{name}", value))]
    config = parse_config(PretrainConfig, [str(flag) for flag in flags])
    return MaskedLanguageModel(config, 0, 1)


@pytest.mark.parametrize("model", ["bert", "roberta"])
@pytest.mark.parametrize("method", ["dense_dropout", "smoe_dropout"])
def test_it_computes_what_the_folders_model_does(model, method, hf_folder, prepared):
    folder, theirs = hf_folder(model)
    built = task(prepared, model, method, folder)
    assert (built.config.d_model, built.config.d_hidden, built.config.num_heads) == (32, 96, 4)
    assert built.config.score == ("sum" if method == "smoe_dropout" else "softmax_after_topk")
    ours = built.bare().eval()
    if method == "smoe_dropout":
        smoe.set_top_k(ours, 16)
    ids = torch.from_numpy(built.data["valid"][:3].astype("int64"))
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_head_and_with_other_positions(hf_folder, prepared):
    folder, theirs = hf_folder("bert", whole=False, positions=24)
    built = task(prepared, "bert", "dense_dropout", folder)
    fresh = task(prepared, "bert", "dense_dropout", folder)
    ids = torch.from_numpy(built.data["valid"][:3, :24].astype("int64"))
    with torch.no_grad():
        ours = built.bare().eval().base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours, theirs(input_ids=ids).last_hidden_state, atol=1e-4, rtol=1e-4)
    learned, table = (m.embeddings.position_embeddings.weight for m in (theirs, built.bare().base_model))
    assert torch.equal(table, torch.cat((learned, learned[:8])))
    head = built.bare().cls.predictions.transform.dense.weight
    assert torch.equal(head, fresh.bare().cls.predictions.transform.dense.weight) and 0.01 < head.std() < 0.03


def test_a_run_records_it_and_goes_on_and_is_measured_without_it(hf_folder, prepared, pretrain, start, tmp_path):
    folder, _ = hf_folder("bert")
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(folder, copy)
    trained = pretrain("bert", "smoe_dropout", run, "--start_from", copy, "--steps", 10)
    assert trained.wait() == 0, trained.err
    record = result(run)
    assert record["start_from"].keys() == {"model_type", "sha256"} and record["start_from"]["model_type"] == "bert"
    assert "start_from" not in record["config"] and record["config"]["d_model"] == 32
    shutil.rmtree(copy)
    measured = start("bert.evaluate", run, "--k", 16)
    assert measured.wait() == 0, measured.err
    bits = record["metrics"]["bits_per_masked_token"]["test"]["16"]
    assert f"{bits:.4f}" in measured.out


@pytest.mark.parametrize(
    ("sizes", "flags", "message"),
    [
        ({"hidden_act": "relu"}, {}, "has hidden_act = 'relu'; it must be 'gelu'"),
        ({"layer_norm_eps": 1e-3}, {}, "has layer_norm_eps = 0.001; it must be 1e-12"),
        ({}, {"d_model": "64"}, "has hidden_size = 32; it must be 64"),
    ],
)
def test_a_model_that_is_built_otherwise_is_refused(sizes, flags, message, hf_folder, prepared):
    folder, _ = hf_folder("bert", **sizes)
    with pytest.raises(ValueError, match="^start_from: ") as error:
        task(prepared, "bert", "dense_dropout", folder, **flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_folders_that_can_not_be_used_are_one_line(hf_folder, prepared, pretrain, tmp_path):
    folder, built = hf_folder("bert")
    (tmp_path / "empty").mkdir()
    modulized, other, damaged = (shutil.copytree(folder, tmp_path / name) for name in ("smoe", "other", "damaged"))
    smoe.save_pretrained(smoe.modulize(built, 4), modulized)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (damaged / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    for place, message in (
        ("empty", "has no config.json"),
        ("smoe", "has SMoE layers"),
        ("other", "another vocabulary than the data"),
        ("damaged", "start_from: "),
    ):
        done = pretrain("bert", "smoe_dropout", tmp_path / "run", "--start_from", tmp_path / place)
        assert_one_line(done, 2, message)
        assert not (tmp_path / "run").exists()
