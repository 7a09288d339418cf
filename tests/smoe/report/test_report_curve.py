"""The learning curve of one run."""

from __future__ import annotations

import json

import pytest
from made_up import made_up
from matplotlib.figure import Figure

from smoe.report import main, plot_curve

LOG = [
    {"step": 10, "train": {"loss": 3.5, "bpc": 5.0, "k": 8}, "seconds": 1.0},
    {"step": 20, "train": {"loss": 2.8, "bpc": 4.0, "k": [8, 12]}, "seconds": 2.0},
    {"step": 20, "valid": {"bpc": 4.5}, "seconds": 2.0},
    {"step": 20, "valid_k16": {"bpc": 4.25}, "seconds": 2.0},
    {"step": 30, "train": {"loss": None, "bpc": None, "k": [16, 16]}, "seconds": 3.0},
    {"step": 30, "valid": {"bpc": 3.5}, "seconds": 3.0},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(made_up("smoe_dropout")))
    write_log(folder, LOG)
    return folder


def write_log(folder, lines, end=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


@pytest.fixture
def drawn(monkeypatch):
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: found.append(self))
    return found


def lines_of(axes):
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines}


def test_train_and_valid_over_steps_with_k_below(run, drawn):
    write_log(run, LOG[:1] + LOG[2:])
    plot_curve(run, run / "curve.png")
    metric, k = drawn[0].axes
    assert lines_of(metric) == {
        "train": [(10, 5.0)],
        "valid": [(20, 4.5), (30, 3.5)],
        "valid, k = 16": [(20, 4.25)],
    }
    assert metric.get_title(loc="left") == "transformer_xl, SMoE-Dropout, scale cpu, seed 1"
    assert metric.get_ylabel() == "BPC" and k.get_ylabel() == "k"
    assert [tuple(point) for point in k.lines[0].get_xydata().tolist()] == [(10, 8), (30, 16)]


def test_layers_with_k_of_their_own_have_lines_of_their_own(run, drawn):
    write_log(run, LOG[1:])
    plot_curve(run, run / "curve.png")
    found = [[tuple(point) for point in line.get_xydata().tolist()] for line in drawn[0].axes[-1].lines]
    assert found == [[(20, 8), (30, 16)], [(20, 12), (30, 16)]]


def test_where_train_is_not_measured_by_the_metric_its_loss_is_drawn_apart(run, drawn):
    write_log(run, [{"step": 5, "train": {"loss": 0.7}}, {"step": 5, "valid": {"bpc": 3.0}}])
    plot_curve(run, run / "curve.png")
    metric, loss = drawn[0].axes
    assert list(lines_of(metric)) == ["valid"] and lines_of(loss) == {"train": [(5, 0.7)]}
    assert loss.get_ylabel() == "train loss (nats)"


def test_command_draws_it(run, capsys):
    write_log(run, LOG, end='{"step": 40, "tra')  # cut off by a crash
    main([str(run), "--plot", str(run / "slimming.png"), "--curve", str(run / "curve.png")])
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.endswith(f"\n\nlearning curve: {run}/curve.png\nfigure: {run}/slimming.png\n")


@pytest.mark.parametrize(
    "log, words",
    [
        (None, "metrics.jsonl does not exist; a training writes it"),
        ("", "has no numbers of train or valid"),
        ("x\n{}\n", "line 1 is not JSON"),
        ('{"train": {}}\n', "line 1 has no step"),
    ],
)
def test_bad_logs(run, log, words):
    if log is None:
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text(log)
    with pytest.raises(ValueError, match=words):
        plot_curve(run, run / "curve.png")
    assert not (run / "curve.png").exists()


def test_one_run_alone(run):
    with pytest.raises(ValueError, match="--curve is given with 2 runs; it must be one"):
        main([str(run), str(run), "--curve", "a.png"])
