"""How evenly experts are used: counted by hand from the routings of the same passes."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Sentences, tiny

import smoe
from smoe.expert_load import ExpertLoad, LayerLoad, mean_load

N = 8
IDS = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(3))


def by_hand(routings: list[smoe.Routing]) -> LayerLoad:
    """Of one layer's passes."""
    counts = dict.fromkeys(range(N), 0)
    for routing in routings:
        for expert in routing.indices.flatten().tolist():
            if expert >= 0:
                counts[expert] += 1
    shares = [count / sum(counts.values()) for count in counts.values()]
    entropy = sum(-share * math.log(share, N) for share in shares if share > 0)
    losses = [routing.balance_loss.item() for routing in routings if routing.balance_loss is not None]
    return LayerLoad(entropy, max(shares), shares.count(0), sum(losses) / len(losses) if losses else None)


def assert_loads(loads, routings, layers=2):
    """``routings``: as record_routing lists them, a pass after the other."""
    assert len(loads) == layers
    for i, load in enumerate(loads.values()):
        wanted = by_hand(routings[i::layers])
        assert load.dead == wanted.dead and (load.balance_loss is None) == (wanted.balance_loss is None)
        numbers, wanted = ([value for value in each if value is not None] for each in (load, wanted))
        assert numbers == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("router", ["random", "learned", "uniform"])
@pytest.mark.parametrize("k", [1, 3, N, torch.tensor([1, 5, 2, 8])])
def test_load_over_several_passes(router, k):
    model = smoe.modulize(tiny("Llama"), N, seed=0, router=router).train()
    with ExpertLoad(model) as load, smoe.record_routing(model) as routings, smoe.activated(model, k):
        model(IDS)
        model(IDS[:, :3])
        assert_loads(load.read(), routings)
        assert load.read() == {}  # counting started anew
        first = len(routings)
        model(IDS - 1)
        model.eval()
        model(IDS)  # an evaluation
        assert_loads(load.read(), routings[first : first + 2])
        model.train()
    model(IDS)
    assert load.read() == {}


def test_extremes():
    model = smoe.modulize(tiny("Llama"), N, seed=0).train()
    with ExpertLoad(model) as load:
        smoe.set_top_k(model, N)
        model(IDS)
        assert list(load.read().values()) == [(pytest.approx(1.0), 1 / N, 0, None)] * 2
        for _, layer in smoe.smoe_layers(model):
            layer.router.weight.zero_()
            layer.router.bias.copy_(-torch.arange(N))
        smoe.set_top_k(model, 1)
        model(IDS)
        loads = load.read()
    assert list(loads.values()) == [(0.0, 1.0, N - 1, None)] * 2
    assert mean_load(loads) == {"expert_entropy": 0, "busiest_expert": 1, "dead_experts": 2 * (N - 1)}
    assert mean_load({}) == {}


def test_numbers_of_all_layers():
    loads = {"a": LayerLoad(0.5, 0.25, 1, 1.5), "b": LayerLoad(0.75, 0.5, 2, 1.25)}
    numbers = {"expert_entropy": 0.625, "busiest_expert": 0.5, "dead_experts": 3, "balance_loss": 2.75}
    assert mean_load(loads) == numbers


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="Linear has no SMoE layer; there is no load to count"):
        ExpertLoad(torch.nn.Linear(1, 1))


# ---- in Trainer's logs -----------------------------------------------------------------------------------------------


def _train(folder, **callback):
    import transformers

    from smoe.hf import TopKCallback

    transformers.logging.set_verbosity_error()
    model = smoe.modulize(tiny("Llama"), N, seed=0, router="learned")
    args = transformers.TrainingArguments(
        str(folder), max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="no",
        per_device_train_batch_size=3, gradient_accumulation_steps=2, report_to=["tensorboard"], disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    data = {"train_dataset": Sentences(24), "eval_dataset": Sentences(3)}
    trainer = transformers.Trainer(model, args, **data, callbacks=[TopKCallback(2, 6, **callback)])
    with smoe.record_routing(model) as routings:
        trainer.train()
    assert all(not router._watchers for _, layer in smoe.smoe_layers(model) for router in layer.routers)
    return trainer, routings


def _events(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads: name -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_trainer_logs_reach_tensorboard(tmp_path):
    trainer, routings = _train(tmp_path, expert_load=True)
    events = _events(tmp_path)
    # 2 layers, and per log 2 steps of 2 batches, then one batch of evaluation.
    assert len(routings) == 2 * (2 * 2 * 2 + 2)
    of_log = [routings[:8], routings[10:18]]
    numbers = [mean_load({str(i): by_hand(part[i::2]) for i in range(2)}) for part in of_log]
    assert len(numbers[0]) == 4
    for name in numbers[0]:
        assert [step for step, _ in events[f"train/{name}"]] == [2, 4]
        wanted = [number[name] for number in numbers]
        assert [value for _, value in events[f"train/{name}"]] == pytest.approx(wanted, rel=1e-5)
        assert [log[name] for log in trainer.state.log_history if "loss" in log] == pytest.approx(wanted, rel=1e-5)
    ks = [smoe.k_at(step, 4, 2, 6) for step in (1, 3)]
    assert events["train/k"] == list(zip([2, 4], ks, strict=True)) and ks == [3, 5]
    assert not any("expert" in name or name.endswith("/k") for name in events if name.startswith("eval/"))


def test_trainer_logs_k_alone_unless_asked(tmp_path):
    _train(tmp_path)
    events = _events(tmp_path)
    assert events["train/k"] == [(2, 3), (4, 5)] and "train/loss" in events
    assert not any("expert" in name or "balance" in name for name in events)


def test_balance_loss_is_switch_s():
    model = smoe.modulize(tiny("Llama"), N, seed=0, router="learned").train()
    smoe.set_top_k(model, 2)
    with ExpertLoad(model) as load, smoe.record_routing(model) as routings:
        model(IDS)
    for (_, layer_load), routing in zip(load.read().items(), routings, strict=True):
        fraction = F.one_hot(routing.indices, N).double().sum((0, 1)) / routing.indices.numel()
        wanted = N * (fraction * routing.probabilities.double().mean(0)).sum().item()
        assert layer_load.balance_loss == pytest.approx(wanted, rel=1e-5)
