"""The table and the figure, made of result.json files alone."""

from __future__ import annotations

import copy
import json

import pytest

from smoe.errors import run_main
from smoe.run.report import main, paper_bpc, plot_slimming, slimming_table

KS = ("1", "2", "4", "8", "16")


def result(method: str, *bpc: float, **fields) -> dict:
    test = {"dense": bpc[0]} if len(bpc) == 1 else dict(zip(KS, bpc, strict=True))
    active = {k: 3_000_000 + 250_000 * int(k) for k in test if k != "dense"}
    return {
        "method": method,
        "model": "transformer_xl",
        "dataset": {"name": "enwik8", "sha256": "0"},
        "scale": "cpu",
        "seed": 0,
        "parameters": {"total": 7_000_000, "active_per_k": active},
        "bpc": {"test": test},
        **fields,
    }


@pytest.fixture
def results() -> list[dict]:
    return [
        result("dense_dropout", 1.1623),
        result("smoe_dropout", 1.45, 1.32, 1.23, 1.1776, 1.1486),
        result("smoe_dropout", 1.43, 1.30, 1.21, 1.1700, 1.1400, seed=1),
        result("smoe_dropout", 1.5, 1.4, 1.3, 1.2, 1.19, label="hash router"),
    ]


@pytest.fixture
def runs(results, tmp_path) -> list[str]:
    for number, content in enumerate(results):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "result.json").write_text(json.dumps(content))
    return [str(tmp_path / f"run{number}") for number in range(len(results))]


def test_table_has_a_row_a_run_and_a_column_a_k(results):
    lines = slimming_table(results).splitlines()
    assert lines[0] == "Test BPC (lower is better): transformer_xl on enwik8, scale cpu"
    assert lines[2].split() == ["method", "seed", "parameters", "k=1", "k=2", "k=4", "k=8", "k=16", "dense"]
    assert lines[4].split() == ["Dense", "w.", "Dropout", "0", "7.00M", "-", "-", "-", "-", "-", "1.1623"]
    assert lines[5].split() == ["SMoE-Dropout", "0", "7.00M", "1.4500", "1.3200", "1.2300", "1.1776", "1.1486", "-"]
    assert lines[7].startswith("hash router")
    assert len({len(line) for line in lines[2:]}) == 1  # aligned


def test_the_papers_figures_stand_beside_its_own_scale_only(results):
    assert "paper" not in slimming_table(results, paper_bpc())
    at_paper = [{**content, "scale": "paper"} for content in results]
    lines = slimming_table(at_paper, paper_bpc()).splitlines()
    assert lines[4].endswith("  1.1623") and lines[4].count("1.1623") == 2
    assert lines[5].endswith("k=8: 1.1776  k=16: 1.1486")
    assert lines[7].split()[-1] == "-"  # an ablation is not in the paper's row


def test_models_and_scales_are_never_mixed(results):
    text = slimming_table([*results, result("thor", 5, 4, 3, 2, 1, scale="smoke"), result("thor", 9.0, model="bert")])
    assert text.count("Test BPC") == 3
    assert "k=1" not in text.rpartition("Test BPC")[2]  # a block of dense runs has no k columns


@pytest.mark.parametrize(
    "path, value, words",
    [
        (["method"], None, "method is missing"),
        (["bpc"], None, "bpc is missing"),
        (["bpc", "test"], None, "bpc.test is None, expected a number for each k"),
        (["bpc", "test"], {}, "bpc.test is {}"),
        (["bpc", "test"], {"half": 1.0}, "bpc.test has key 'half', expected a number of experts or 'dense'"),
        (["bpc", "test", "8"], "low", "bpc.test.8 is 'low', expected a number"),
        (["bpc", "test", "8"], float("nan"), "bpc.test.8 is nan, expected a number"),
        (["parameters", "total"], None, "parameters.total is missing"),
        (["parameters", "active_per_k"], None, "parameters.active_per_k.1 is missing"),
        (
            ["parameters", "active_per_k", "16"],
            None,
            "parameters.active_per_k.16 is missing, while bpc.test has k = 16",
        ),
    ],
)
def test_a_missing_field_is_named(results, tmp_path, path, value, words):
    broken = copy.deepcopy(results)
    target = broken[1]
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    for make in (lambda: slimming_table(broken), lambda: plot_slimming(broken, tmp_path / "a.png")):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value).startswith(f"result 2: {words}")
    assert not (tmp_path / "a.png").exists()


def test_figure_shows_every_method_once_and_the_mean_of_seeds(results, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    dense = [result("dense_dropout", b, parameters={"total": t}) for b, t in ((1.4, 3.3e6), (1.1623, 7e6))]
    plot_slimming([*results[1:], *dense, result("thor", 2.0, scale="smoke")], tmp_path / "a.png")
    axes, other = drawn[0].axes
    assert sorted(text.get_text() for text in axes.texts) == ["Dense w. Dropout", "SMoE-Dropout", "hash router"]
    curve = axes.lines[0]
    assert list(curve.get_xdata()) == [3.25, 3.5, 4.0, 5.0, 7.0]
    assert list(curve.get_ydata()) == pytest.approx([1.44, 1.31, 1.22, 1.1738, 1.1443])
    colors = {line.get_color() for line in axes.lines}
    assert len(axes.lines) == 3 and len(colors) == 3  # two dense models make a curve, no level line
    assert len(other.lines) == 2  # a single one makes a dot and its level
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.06  # labels do not overlap


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figure_is_written(results, tmp_path, ending, start):
    pytest.importorskip("matplotlib")
    path = plot_slimming(results[:2], tmp_path / f"a.{ending}")
    assert path.read_bytes().startswith(start)


def test_command_prints_table_or_json(runs, capsys, tmp_path):
    main([*runs[:2], str(tmp_path / "run2" / "result.json")])
    assert "1.1486" in capsys.readouterr().out
    main([*runs, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows[1]["test_bpc"]["16"] == 1.1486 and rows[3]["label"] == "hash router"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "run: nowhere does not exist"),
        (["RUN", "--plot", "a.xyz"], "plot: a.xyz ends in '.xyz', expected .png, .pdf or .svg"),
        (["RUN", "--plot", "no/folder/a.png"], "no/folder/a.png: No such file or directory"),
        ([], "the following arguments are required: RUN"),
        (["RUN", "--plt"], "unrecognized arguments: --plt"),
    ],
)
def test_command_ends_with_one_line_for_bad_input(runs, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        run_main(main, [runs[0] if argument == "RUN" else argument for argument in arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_command_names_the_file_with_the_missing_field(runs, tmp_path):
    (tmp_path / "run1" / "result.json").write_text('{"method": "smoe"}')
    with pytest.raises(ValueError, match=r"run1: model is missing"):
        main(runs)
