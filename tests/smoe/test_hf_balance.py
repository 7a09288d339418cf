"""Balance losses in ``transformers.Trainer``: a step's gradients are those of the sum written out."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import run_ranks
from tiny_models import tiny

import smoe
from smoe.hf import BalanceLoss, TopKCallback

transformers.logging.set_verbosity_error()
N, K, WEIGHT, ACCUMULATED = 8, 3, 0.5, 2
LENGTHS = (8, 3, 5, 8, 2, 7, 4, 6)  # so that batches differ in how many tokens they have


class Padded(torch.utils.data.Dataset):
    """Sentences of LENGTHS tokens, padded to 8."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, i):
        ids = torch.randint(3, 40, (8,), generator=torch.Generator().manual_seed(i))
        mask = (torch.arange(8) < LENGTHS[i]).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Balanced(BalanceLoss, transformers.Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Gradients(transformers.TrainerCallback):
    """Those of the last step, before the optimizer sees them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters()}


def make_model(k=K):
    return smoe.set_top_k(model := smoe.modulize(tiny("Llama"), N, seed=0, router="learned"), k) or model


def train(folder, *, means=False, ranks=1, callbacks=(), **options):
    """One step of Trainer on all sentences, 2 per batch; the model, its gradients and the logs."""
    model, gradients = make_model(), Gradients()
    args = transformers.TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=len(LENGTHS) // 2 // ranks,
        max_grad_norm=0, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
        ddp_backend="gloo" if ranks > 1 else None, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Balanced(model, args, balance_weight=WEIGHT, train_dataset=Padded(), callbacks=[gradients, *callbacks])
    assert trainer.model_accepts_loss_kwargs
    trainer.model_accepts_loss_kwargs = not means  # as of a model whose loss is the mean over its batch
    trainer.train()
    return model, gradients.seen, trainer.state.log_history[0]


def naive_balance(routing, mask):
    """N * sum_e f_e * P_e of the tokens that count."""
    tokens = [t for t in range(len(routing.indices)) if mask.flatten()[t]]
    total = 0.0
    for e in range(N):
        chosen = sum((routing.indices[t] == e).any().item() for t in tokens) / (K * len(tokens))
        total = total + N * chosen * torch.stack([routing.probabilities[t, e] for t in tokens]).mean()
    return total


def naive(means):
    """The loss of the step, and its gradients."""
    model = make_model().train()
    data = torch.utils.data.default_collate([Padded()[i] for i in range(len(LENGTHS))])
    batches = [{name: value[i : i + 2] for name, value in data.items()} for i in range(0, len(LENGTHS), 2)]
    sums, counts, balances = [], [], []
    for batch in batches:
        with smoe.record_routing(model) as routings:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        sums.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"))
        counts.append((labels != -100).sum())
        balances.append(sum(naive_balance(routing, batch["attention_mask"]) for routing in routings))
    if means:
        task = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(batches)
    else:
        task = sum(sums) / sum(counts)
    loss = task + WEIGHT * sum(balances) / len(batches)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def wanted():
    return naive(means=False)


def check(gradients, logs, wanted):
    loss, expected = wanted
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    routers = [name for name in gradients if "router.weight" in name]
    assert len(routers) == 2 and all(gradients[name].abs().max() > 1e-3 for name in routers)


def test_accumulated_gradients(tmp_path, wanted):
    model, gradients, logs = train(tmp_path)
    check(gradients, logs, wanted)


def test_accumulated_gradients_of_a_model_whose_loss_is_a_mean_over_its_batch(tmp_path):
    _, gradients, logs = train(tmp_path, means=True)
    check(gradients, logs, naive(means=True))


def test_under_activation_checkpointing(tmp_path, wanted):
    _, gradients, logs = train(tmp_path, activation_checkpointing=True)
    check(gradients, logs, wanted)
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        train(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.slow
def test_compiled(tmp_path, wanted):
    """The backend that only traces: how the graph breaks at the routers is what matters here."""
    torch.compiler.reset()
    load = TopKCallback(K, K, expert_load=True)
    _, gradients, logs = train(tmp_path, torch_compile=True, torch_compile_backend="eager", callbacks=[load])
    check(gradients, logs, wanted)
    assert logs["k"] == K and 1 / N < logs["busiest_expert"] <= 1 / K


def _rank(rank, folder, wanted):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "1"}
    _, gradients, logs = train(Path(folder) / str(rank), ranks=2, callbacks=[TopKCallback(K, K, expert_load=True)])
    check({name.removeprefix("module."): g for name, g in gradients.items()}, logs, wanted)
    return {name: logs[name] for name in ("expert_entropy", "busiest_expert", "dead_experts", "balance_loss")}


@pytest.mark.distributed
def test_on_two_ranks(tmp_path, wanted):
    """The load that they log is that of both ranks, as one process logs it."""
    loads = run_ranks(_rank, 2, str(tmp_path), wanted)
    _, _, alone = train(tmp_path / "alone", callbacks=[TopKCallback(K, K, expert_load=True)])
    for load in loads:
        assert load == pytest.approx({name: alone[name] for name in load}, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "router", "message"),
    [
        ({"balance_weight": -1}, "learned", "balance_weight is -1; it must be a number of at least 0"),
        ({}, "random", "LlamaForCausalLM has no learned router, and others have no balance loss; leave out"),
    ],
)
def test_what_is_refused(options, router, message, tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=message):
        Balanced(smoe.modulize(tiny("Llama"), N, router=router), args, **options)
