"""k during ``transformers.Trainer``."""

import pytest
import torch
import transformers
from tiny_models import Sentences, tiny
from torch import nn

import smoe

transformers.logging.set_verbosity_error()


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

    model = smoe.modulize(tiny("BERT", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), 8, seed=0)
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
    trainer = transformers.Trainer(
        model, args, train_dataset=Sentences(24), callbacks=[TopKCallback(**callback), watch]
    )
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

    # A checkpoint has the k of the last step before it; the model that training leaves, the schedule's last.
    assert smoe.get_top_k(smoe.from_pretrained(tmp_path / "whole" / "checkpoint-4")) == smoe.k_at(3, 9, 4, 8)
    checkpoint = smoe.from_pretrained(tmp_path / "whole" / "checkpoint-9")
    assert smoe.get_top_k(checkpoint) == smoe.k_at(8, 9, 4, 8)
    assert torch.equal(checkpoint.state_dict()[name], whole.state_dict()[name])


def test_a_checkpoint_of_an_architecture_that_is_saved_under_other_names_resumes(tmp_path):
    from smoe.hf import TopKCallback

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            generator = torch.Generator().manual_seed(i)
            return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 2}

    def train(**resume):
        model = smoe.modulize(tiny("ViT", hidden_dropout_prob=0.0), 8, seed=0)
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2
        )
        transformers.Trainer(model, args, train_dataset=Images(), callbacks=[TopKCallback()]).train(**resume)
        return model

    whole = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_callback_options():
    from smoe.hf import TopKCallback

    model = smoe.modulize(tiny("BERT"), 8)
    state = transformers.TrainerState(global_step=0, max_steps=10)
    TopKCallback(2, 6, "linear_decrease").on_step_begin(None, state, None, model=model)
    assert smoe.get_top_k(model) == 6
    TopKCallback(mode="constant").on_step_begin(None, state, None, model=model)
    assert smoe.get_top_k(model) == 8
    with pytest.raises(ValueError, match="mode is 'square'"):
        TopKCallback(mode="square")
    with pytest.raises(ValueError, match=r"smoe.modulize\(model\) first"):
        TopKCallback().on_train_begin(None, state, None, model=nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_max": 9}, "k_max is 9; it must be at most 8, the experts of bert.encoder.layer.0.output.dense.mlp"),
        ({"k_min": 9}, "k_min is 9; it must be at most 8, the experts of"),
        ({"k_min": 3, "k_max": 16}, "k_max is 16; it must be at most 8"),
    ],
)
def test_a_k_that_the_model_lacks_is_refused_before_the_first_step(options, message, tmp_path):
    from smoe.hf import TopKCallback

    model = smoe.modulize(tiny("BERT"), 8)
    args = transformers.TrainingArguments(str(tmp_path), max_steps=9, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, args, train_dataset=Sentences(24), callbacks=[TopKCallback(**options)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_max": 0}, "k_max is 0; it must be a whole number of at least 1"),
        ({"k_min": True}, "k_min is True"),
        ({"k_min": 2.5}, "k_min is 2.5"),
        ({"k_min": 5, "k_max": 4}, "k_min is 5 and k_max is 4; k_min must be at most k_max"),
    ],
)
def test_a_k_that_no_model_has_is_refused_at_once(options, message):
    from smoe.hf import TopKCallback

    with pytest.raises(ValueError, match=message):
        TopKCallback(**options)
