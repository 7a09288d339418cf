"""Saving and loading, and k during ``transformers.Trainer``."""

import json

import pytest
import torch
from tiny_models import MODELS, build, inputs_of, logits_of
from torch import nn

import smoe

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


def _model(name, **more):
    row = next(row for row in MODELS if row[0] == name)
    return build(row[2], {**row[3], **more})


def _assert_same(a, b, inputs):
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(b.state_dict()[k], v) for k, v in a.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits_of(a, **inputs), logits_of(b, **inputs))


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "BART", "Llama", "T5 v1.1", "ALBERT", "ViT", "ModernBERT", "GPT-J"])
def test_round_trip(name, tmp_path):
    model = _model(name)
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
    model = smoe.modulize(_model("BERT"), 4, top_k=2, router=router, score="softmax_before_topk", seed=0)
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
    model = _model(name)
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
    model = _model("BERT")
    smoe.demodulize(smoe.modulize(model, 4))
    smoe.save_pretrained(model, tmp_path)
    assert "smoe" not in json.loads((tmp_path / "config.json").read_text())
    _assert_same(model, transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), inputs_of(model))
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_their_save_pretrained_is_enough(tmp_path):
    # What a Trainer writes as a checkpoint.
    model = smoe.modulize(_model("BERT"), 4, top_k=2, seed=0)
    model.save_pretrained(tmp_path)
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_modulized_part_of_a_model(tmp_path):
    model = _model("BERT")
    smoe.modulize(model.bert, 4, top_k=2, seed=0)
    smoe.save_pretrained(model, tmp_path)
    _assert_same(model, smoe.from_pretrained(tmp_path), inputs_of(model))


def test_dtype(tmp_path):
    model = smoe.modulize(_model("BERT").bfloat16(), 4, top_k=2, seed=0)
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


def test_wrong_folder_or_model(tmp_path):
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


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(3, 40, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class _Watch(transformers.TrainerCallback):
    """Notes the k each step ran with; stops after ``until`` steps."""

    def __init__(self, until=None):
        self.seen, self.until = [], until

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((state.global_step, smoe.get_top_k(model)))
        if state.global_step == self.until:
            control.should_training_stop = True


def _train(tmp_path, until=None, resume=False, **callback):
    from smoe.hf import TopKCallback

    model = smoe.modulize(_model("BERT", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), 8, seed=0)
    watch = _Watch(until)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=9,
        per_device_train_batch_size=4,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        learning_rate=1e-2,
    )
    trainer = transformers.Trainer(model, args, train_dataset=_Rows(), callbacks=[TopKCallback(**callback), watch])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
    return model, watch.seen


def test_k_follows_the_schedule_and_survives_resuming(tmp_path):
    whole, seen = _train(tmp_path / "whole")
    assert seen == [(step + 1, smoe.k_at(step, 9, 4, 8)) for step in range(9)]
    assert len({k for _, k in seen}) == 5 and smoe.get_top_k(whole) == 8

    _train(tmp_path / "cut", until=5)
    resumed, rest = _train(tmp_path / "cut", resume=True)
    assert rest == seen[4:]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    checkpoint = smoe.from_pretrained(tmp_path / "whole" / "checkpoint-9")
    assert torch.equal(checkpoint.state_dict()[name], whole.state_dict()[name])


def test_callback_options():
    from smoe.hf import TopKCallback

    model = smoe.modulize(_model("BERT"), 8)
    state = transformers.TrainerState(global_step=0, max_steps=10)
    TopKCallback(2, 6, "linear_decrease").on_step_begin(None, state, None, model=model)
    assert smoe.get_top_k(model) == 6
    TopKCallback(mode="constant").on_step_begin(None, state, None, model=model)
    assert smoe.get_top_k(model) == 8
    with pytest.raises(ValueError, match="mode is 'square'"):
        TopKCallback(mode="square")
    with pytest.raises(ValueError, match=r"smoe.modulize\(model\) first"):
        TopKCallback().on_train_begin(None, state, None, model=nn.Linear(1, 1))
