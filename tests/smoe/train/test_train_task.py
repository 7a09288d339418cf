"""The loop has room for tasks: one of a few lines trains, stops, goes on bit for bit and leaves a record."""

import dataclasses
import json
import shutil
import signal

import pytest
from runs import assert_one_line, assert_same_weights, lines, losses, result, weights
from toy_task import POINTS, Toy, toy, toy_config

from smoe import METHODS, set_top_k
from smoe.errors import Stopped
from smoe.report import check_result
from smoe.train.checkpoint import checkpoint_path, list_steps
from smoe.train.evaluation import measure
from smoe.train.loop import train
from smoe.train.processes import Processes
from smoe.train.resume import load_checkpoint, read_metrics


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_leaves_a_record(method, tmp_path):
    config = toy_config(tmp_path, method, steps=30, eval_interval=10)
    train(Toy, config, Processes())
    record = result(tmp_path)
    assert (record["task"], record["model"], record["method"]) == ("toy", "classifier", method)
    assert record["dataset"] == {"name": "sectors", "sha256": "3"} and record["tokens_per_step"] == 20
    keys = {"1", "4"} if METHODS[method].routed else {"dense"}
    assert record["metric"] == "accuracy" and record["metrics"].keys() == {"accuracy", "cross_entropy"}
    for metric in record["metrics"].values():
        assert metric["n"] == {"valid": POINTS["valid"], "test": POINTS["test"]}
        assert metric["valid"].keys() == metric["test"].keys() == record["flops"].keys() == keys
    assert record["metrics"]["accuracy"]["direction"] == "higher"
    assert all(
        value * 70 == pytest.approx(round(value * 70)) for value in record["metrics"]["accuracy"]["test"].values()
    )
    assert losses(tmp_path)[30] < losses(tmp_path)[1]
    assert check_result(record)


def test_the_best_checkpoint_has_the_highest_accuracy_and_is_what_is_swept(tmp_path):
    """A high learning rate and many evaluations: with some seed the best of them is not the last."""
    for seed in range(1, 20):
        run = tmp_path / str(seed)
        config = toy_config(run, steps=40, eval_interval=1, learning_rate=0.5, seed=seed)
        train(Toy, config, Processes())
        found = {
            line["step"]: line["valid"]["accuracy"] for line in read_metrics(run / "metrics.jsonl") if "valid" in line
        }
        best = max(found, key=lambda step: (found[step], -step))  # the first of the highest
        if found[best] > found[40] and best < 39:
            break
    else:
        pytest.fail("nothing to choose with any seed")
    record = result(run)
    assert record["best"] == {"step": best, "metric": "accuracy", "value": found[best], "k": 4}
    assert list_steps(run / "checkpoints") == [best, 39, 40]
    # What was swept is the model of that step.
    task, _ = toy(config)
    task.model.load_state_dict(weights(run, best))
    set_top_k(task.model.eval(), 1)
    points, labels = task.data["test"]
    right = (task.model(points, labels).logits.argmax(-1) == labels).double().mean().item()
    assert record["metrics"]["accuracy"]["test"]["1"] == pytest.approx(right, abs=1e-12)
    assert record["metrics"]["accuracy"]["valid"]["4"] == found[best]


@pytest.mark.parametrize(
    ("fields", "ks"),
    [
        ({"method": "smoe"}, [2, 4]),
        ({"method": "smoe_dropout"}, [4]),
        ({"schedule": "linear_decrease"}, [2, 4]),
        ({"schedule": "released_cosine_decrease", "k_min": 1}, [1, 4]),
        ({"schedule": "random", "k_max": 3}, [3, 4]),
    ],
)
def test_a_best_checkpoint_is_kept_where_training_ends_and_at_n(tmp_path, fields, ks):
    """Each is swept; a high learning rate and many evaluations let them differ."""
    config = toy_config(tmp_path, steps=40, eval_interval=1, learning_rate=0.3, sweep=(1, 2, 3, 4), **fields)
    assert config.eval_ks() == ks
    train(Toy, config, Processes())
    record, logged = result(tmp_path), read_metrics(tmp_path / "metrics.jsonl")
    others = record.get("best_at_other_k", [])
    for k, best in zip(ks, [record["best"], *others], strict=True):
        split = "valid" if k == ks[0] else f"valid_k{k}"
        found = {line["step"]: line[split]["accuracy"] for line in logged if split in line}
        step = max(found, key=lambda step: (found[step], -step))
        assert len(found) == 40 and [best[name] for name in ("k", "step", "value")] == [k, step, found[step]]
        metrics = record["metrics"] if best["step"] == record["best"]["step"] else best["metrics"]
        assert metrics["accuracy"]["valid"][str(k)] == found[step]
        assert step in list_steps(tmp_path / "checkpoints")


def test_patience_ends_a_training_that_brings_no_new_best(tmp_path, monkeypatch, capsys):
    """At the step that the values of an undisturbed run say, stopped and resumed on the way or not."""
    fields = {"steps": 40, "eval_interval": 2, "learning_rate": 0.5}
    train(Toy, toy_config(tmp_path / "whole", **fields), Processes())
    logged = read_metrics(tmp_path / "whole/metrics.jsonl")
    found = {line["step"]: line["valid"]["accuracy"] for line in logged if "valid" in line}
    since = {step: step - max((s for s in found if s <= step), key=lambda s: (found[s], -s)) for step in found}
    end = next(step for step, waited in since.items() if waited == 3 * 2)
    assert end < 40
    alone, stopped = (toy_config(tmp_path / name, patience=3, **fields) for name in ("alone", "stopped"))
    capsys.readouterr()
    train(Toy, alone, Processes())
    assert f"no new best in 3 evaluations: ends after step {end} of 40\n" in capsys.readouterr().out
    monkeypatch.setenv("TOY_STOP_AT", str(end - 2))  # between two evaluations
    with pytest.raises(Stopped):
        train(Toy, stopped, Processes())
    monkeypatch.delenv("TOY_STOP_AT")
    stopped = dataclasses.replace(stopped, resume=True)
    for _ in range(2):  # the second time as if it had been killed before its record was written
        train(Toy, stopped, Processes())
        assert_same_weights(tmp_path / "alone", tmp_path / "stopped")
        of_whole = {step: loss for step, loss in losses(tmp_path / "whole").items() if step <= end}
        assert losses(tmp_path / "alone") == losses(tmp_path / "stopped") == of_whole
        records = [result(tmp_path / name) for name in ("alone", "stopped")]
        for record in records:
            assert record["steps"] == end and record["config"]["patience"] == 3
            assert record["best"]["step"] == end - 6 and record["metrics"] == records[0]["metrics"]
            assert (
                record["training_flops"] == records[0]["training_flops"] < result(tmp_path / "whole")["training_flops"]
            )
        (tmp_path / "stopped/result.json").unlink()


FLAGS = ("--method", "thor", "--scale", "smoke")


def test_stopped_by_a_signal_it_goes_on_bit_for_bit(start, tmp_path):
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert start("toy_task", *FLAGS, "--run_dir", alone).wait() == 0
    # The step that is running ends, and so does the run: in the middle of two evaluations and of two log lines.
    flags = (*FLAGS, "--run_dir", stopped, "--log_interval", 3)
    command = start("toy_task", *flags, env={"TOY_STOP_AT": "6"})
    assert command.wait() == 75, command.err
    assert command.err == "error: stopped by a signal after step 7; a checkpoint is written, --resume goes on from it\n"
    assert list_steps(stopped / "checkpoints") == [4, 7] and not (stopped / "result.json").exists()
    again = start("toy_task", *flags, "--resume")
    assert again.wait() == 0 and "resumed after step 7" in again.out, again.err
    assert_same_weights(alone, stopped)
    last = [load_checkpoint(run / "checkpoints" / "step-00000012").tensors for run in (alone, stopped)]
    assert last[0]["optimizer"].keys() == last[1]["optimizer"].keys()
    assert all(value.equal(last[1]["optimizer"][name]) for name, value in last[0]["optimizer"].items())
    assert losses(stopped)[9] == pytest.approx(sum(losses(alone)[step] for step in (7, 8, 9)) / 3, rel=1e-12)
    for name in ("metrics", "best", "flops", "training_flops", "parameters"):
        assert result(alone)[name] == result(stopped)[name]


def test_a_second_run_needs_its_own_folder_and_a_finished_one_is_left_alone(tmp_path, capsys):
    config = toy_config(tmp_path)
    train(Toy, config, Processes())
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        train(Toy, config, Processes())
    train(Toy, toy_config(tmp_path, resume=True), Processes())
    assert "is finished" in capsys.readouterr().out and (tmp_path / "result.json").read_bytes() == before


def test_the_handlers_of_signals_are_given_back(tmp_path, monkeypatch):
    def before(*_): ...

    previous = signal.signal(signal.SIGTERM, before)
    try:
        monkeypatch.setenv("TOY_STOP_AT", "2")
        with pytest.raises(Stopped, match="after step 3"):
            train(Toy, toy_config(tmp_path), Processes())
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_its_own_fields_are_flags_and_checked(start, tmp_path):
    assert_one_line(
        start("toy_task", *FLAGS, "--run_dir", tmp_path / "run", "--classes", 1), 2, "classes is 1", "at least 2"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("mode", "differ"), [("random", False), ("random_per_layer", True)])
def test_the_k_of_every_layer_is_set_and_logged(mode, differ, tmp_path, monkeypatch):
    config = toy_config(tmp_path, schedule=mode, k_min=1)
    used, forward = [], Toy.forward
    spied = lambda self, *args: used.append([mlp.top_k for mlp in self.model.layers]) or forward(self, *args)  # noqa: E731
    monkeypatch.setattr(Toy, "forward", spied)
    train(Toy, config, Processes())
    assert used == [config.ks_at(step) for step in range(12)]
    assert any(a != b for a, b in used) == differ and len({tuple(ks) for ks in used}) > 2
    logged = [line["k"] for line in lines(tmp_path).values()]
    assert logged == [a if a == b else [a, b] for a, b in used]


@pytest.mark.distributed
def test_two_processes_do_what_one_does(start_ranks, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--method", "smoe_dropout", "--scale", "smoke")
    for ranks, run, more in ((1, one, ()), (2, two, ("--expert_parallel", 2))):
        for command in start_ranks(ranks, "toy_task", *flags, *more, "--run_dir", run):
            assert command.wait() == 0, command.err
    assert losses(one) == pytest.approx(losses(two), abs=1e-5)
    assert json.dumps(result(one)["metrics"]["accuracy"]["n"]) == json.dumps(result(two)["metrics"]["accuracy"]["n"])


@pytest.mark.distributed
def test_a_parameter_that_the_loss_does_not_reach_is_named(start, start_ranks, tmp_path):
    spare = {"TOY_SPARE": "1"}
    ranks = start_ranks(2, "toy_task", *FLAGS, "--run_dir", tmp_path / "two", env={0: spare, 1: spare})
    for rank in ranks:
        assert rank.wait() == 2, rank.err
    assert_one_line(ranks[0], 2, "spare.weight, spare.bias got no gradient", "requires_grad_(False)")
    assert start("toy_task", *FLAGS, "--run_dir", tmp_path / "one", env=spare).wait() == 0, "alone it does no harm"


@pytest.mark.parametrize(("learning_rate", "best", "other"), [(0.05, 8, 12), (0.02, 12, 4)])
def test_each_best_checkpoint_is_swept_with_its_own_weights(tmp_path, learning_rate, best, other):
    config = toy_config(tmp_path, "smoe", seed=2, learning_rate=learning_rate)
    train(Toy, config, Processes())
    record = result(tmp_path)
    (at_all,) = record["best_at_other_k"]
    assert (record["best"]["step"], at_all["step"]) == (best, other), "else this shows nothing"
    task, processes = toy(config)
    for step, metrics in ((best, record["metrics"]), (other, at_all["metrics"])):
        task.model.load_state_dict(weights(tmp_path, step))
        for k in (1, 4):
            assert (
                measure(task, "test", k, processes).values["cross_entropy"] == metrics["cross_entropy"]["test"][str(k)]
            )


# ---- a checkpoint knows its run


def interrupted(run_dir, **fields) -> None:
    """A run that was cut off after step 8 of 12."""
    train(Toy, toy_config(run_dir, **fields), Processes())
    (run_dir / "result.json").unlink()
    shutil.rmtree(checkpoint_path(run_dir / "checkpoints", 12))


class OtherPoints(Toy):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.dataset = {"name": "sectors", "sha256": "of others"}


class PointsFromElsewhere(Toy):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.dataset = self.dataset | {"origin": "a mirror", "note": "the first one did not answer"}


def test_a_run_is_resumed_with_the_same_data_from_elsewhere(tmp_path):
    interrupted(tmp_path)
    train(PointsFromElsewhere, toy_config(tmp_path, resume=True), Processes())
    assert result(tmp_path)["dataset"]["origin"] == "a mirror"


def test_a_run_is_not_resumed_with_other_data(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(ValueError) as error:
        train(OtherPoints, toy_config(tmp_path, resume=True), Processes())
    message = str(error.value)
    assert message.startswith("data: ") and '"of others"' in message and '"sha256": "3"' in message
    assert f"but {tmp_path}/checkpoints/step-00000008 was trained on" in message and "\n" not in message
    del error  # with the frames that hold the run folder's lock
    train(Toy, toy_config(tmp_path, resume=True), Processes())
    assert result(tmp_path)["dataset"]["sha256"] == "3"
    with pytest.raises(ValueError, match=rf"^data: .*of others.*, but {tmp_path}/result.json was trained on .*\"3\""):
        train(OtherPoints, toy_config(tmp_path, resume=True), Processes())
    for broken in ("{", "[]", '{"dataset": 3}'):
        (tmp_path / "result.json").write_text(broken)
        with pytest.raises(ValueError, match=rf"^{tmp_path}/result.json: .*; without this file --resume makes it anew"):
            train(Toy, toy_config(tmp_path, resume=True), Processes())


@pytest.mark.parametrize(("field", "value"), [("seed", 2), ("d_model", 10)])
def test_a_run_does_not_go_on_from_a_checkpoint_of_another_one(tmp_path, field, value):
    interrupted(tmp_path / "run")
    interrupted(tmp_path / "other", **{field: value})
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    own = getattr(toy_config("unused"), field)
    place = tmp_path / "run" / "checkpoints" / "step-00000008" / "state.json"
    with pytest.raises(ValueError, match=f"^{field}: {own} differs from {value} in {place}; resume with the recorded"):
        train(Toy, toy_config(tmp_path / "run", resume=True), Processes())


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path, capsys):
    interrupted(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoint_path(checkpoints, 8), checkpoint_path(checkpoints, 10))
    train(Toy, toy_config(tmp_path, resume=True), Processes())
    said = capsys.readouterr()
    assert "warning: step-00000010 is damaged (step-00000010: is of step 8)" in said.err
    assert "resumed after step 8" in said.out
