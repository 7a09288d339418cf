"""Tables, figures and checks, made of records alone."""

from __future__ import annotations

import copy
import json
from statistics import fmean, stdev

import pytest
from commands import assert_main_refuses
from matplotlib.figure import Figure

from smoe.report import check_result, main, plot_slimming, read_result, slimming_table, with_block

KS = ("1", "2", "4", "8", "16")
BPC = {"title": "BPC", "unit": "bits per byte", "direction": "lower"}
ACCURACY = {"title": "Accuracy", "unit": "share of n examples", "direction": "higher"}


def result(method: str, *values: float, config: dict | None = None, **fields) -> dict:
    """A record as a run writes it, with these values of the test split."""
    test = {"dense": values[0]} if len(values) == 1 else dict(zip(KS, values, strict=True))
    active = {k: 3_000_000 + 250_000 * int(k) for k in test if k != "dense"}
    return {
        "model": "transformer_xl",
        "method": method,
        "task": "language_model",
        "metric": "bpc",
        "metrics": {"bpc": {**BPC, "n": {"valid": 1000, "test": 2000}, "valid": {k: 9.0 for k in test}, "test": test}},
        "best": {"step": 20, "metric": "bpc", "value": 9.0, "k": 16},
        "dataset": {"name": "enwik8", "sha256": "0" * 64},
        "scale": "cpu",
        "seed": 0,
        "parameters": {"total": 7_000_000, "active_per_k": active},
        "config": {"method": method, "seed": 0, "steps": 20, "run_dir": "runs/x", **(config or {})},
        **fields,
    }


def classified(**splits: dict) -> dict:
    """A record measured by accuracy."""
    record = result("smoe", *range(5), dataset={"name": "sst2"})
    return record | {"task": "classification", "metric": "accuracy", "metrics": {"accuracy": {**ACCURACY, **splits}}}


@pytest.fixture
def results() -> list[dict]:
    return [
        result("dense_dropout", 1.1623),
        result("smoe_dropout", 1.45, 1.32, 1.23, 1.1776, 1.1486),
        result("smoe_dropout", 1.43, 1.30, 1.21, 1.1700, 1.1400, seed=1, config={"seed": 1, "run_dir": "runs/y"}),
        result("smoe_dropout", 1.5, 1.4, 1.3, 1.2, 1.19, label="SMoE-Dropout, router hash", config={"router": "hash"}),
    ]


@pytest.fixture
def runs(results, tmp_path) -> list[str]:
    for number, content in enumerate(results):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "result.json").write_text(json.dumps(content))
    return [str(tmp_path / f"run{number}") for number in range(len(results))]


def labels(*records: dict) -> list[str]:
    """The first cell of each row of the one table that these records make."""
    lines = slimming_table(records).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("method "))
    width = lines[head].index("seed")
    return [line[:width].rsplit("  ", 1)[0].rstrip() for line in lines[head + 2 :]]


# ---- tables


def test_table_has_a_row_per_group_and_a_column_per_k(results):
    lines = slimming_table([results[0], results[1], results[3]]).splitlines()
    assert lines[0] == ("Test BPC (bits per byte, lower is better): transformer_xl on enwik8, scale cpu, n = 2,000")
    assert lines[2].split() == ["method", "seed", "parameters", "k=1", "k=2", "k=4", "k=8", "k=16", "dense"]
    assert lines[4].split() == ["Dense", "w.", "Dropout", "0", "7.00M", "-", "-", "-", "-", "-", "1.1623"]
    assert lines[5].split() == ["SMoE-Dropout", "0", "7.00M", "1.4500", "1.3200", "1.2300", "1.1776", "1.1486", "-"]
    assert lines[6].startswith("SMoE-Dropout, router hash  ")
    assert len({len(line) for line in lines[2:]}) == 1  # aligned


def test_runs_that_differ_in_the_seed_alone_share_a_row(results):
    lines = slimming_table(results).splitlines()
    assert lines[1] == "Rows with several seeds: mean ± standard deviation over n runs."
    assert lines[6].startswith("SMoE-Dropout  ") and "  0, 1 (n = 2)  " in lines[6]
    assert f"{fmean([1.45, 1.43]):.4f} ± {stdev([1.45, 1.43]):.4f}" in lines[6]
    assert len(lines) == 8
    three = [*results, result("smoe_dropout", 1.41, 1.30, 1.21, 1.17, 1.14, seed=7)]
    lines = slimming_table(three).splitlines()
    assert "0, 1, 7 (n = 3)" in lines[6] and f"1.4300 ± {stdev([1.45, 1.43, 1.41]):.4f}" in lines[6]
    assert slimming_table([*three, three[1]]) == slimming_table(three)  # the same record twice is one run


def test_a_field_that_came_later_tells_runs_apart_only_where_it_changes_something():
    values = (1.45, 1.32, 1.23, 1.1776, 1.1486)
    before, later = result("smoe", *values, seed=1), result("smoe", *values, seed=2, config={"beta2": 0.999})
    assert labels(before, later) == ["SMoE"]
    other = result("smoe", *values, seed=2, config={"beta2": 0.98})
    assert labels(before, other, later) == ["SMoE", "SMoE, beta2 0.98"]


def test_another_run_of_a_seed_is_no_further_seed(results):
    again = result("smoe_dropout", 1.41, 1.30, 1.21, 1.17, 1.14, seed=results[1]["seed"])
    lines = slimming_table([*results, again]).splitlines()
    assert "  0, 1 (n = 2)  " in lines[6] and f"{fmean([1.45, 1.43]):.4f}" in lines[6]
    (row,) = [line for line in lines if line.startswith(f"SMoE-Dropout, run 2 of seed {again['seed']}  ")]
    assert "1.4100" in row and "±" not in row


def test_runs_that_differ_in_more_than_the_seed_say_in_what():
    values = (1.45, 1.32, 1.23, 1.1776, 1.1486)
    short, long = result("smoe", *values), result("smoe", *values, config={"steps": 24})
    assert labels(short, long) == ["SMoE, steps 20", "SMoE, steps 24"]
    other = result("smoe", *values, config={"steps": 28, "learning_rate": 1e-3, "k_max": None})
    assert labels(short, long, other) == ["SMoE, steps 20", "SMoE, steps 24", "SMoE, learning_rate 0.001, steps 28"]
    # What most of them have goes without saying.
    thor = result("thor", *values)
    assert labels(short, thor, long) == ["SMoE", "THOR", "SMoE, steps 24"]
    # Where a run was, how often it said something, and who computed its experts are no differences.
    elsewhere = {"run_dir": "b", "data": "c", "log_interval": 7, "scale_reason": "asked for", "engine": "torch"}
    assert labels(short, result("smoe", *values, seed=3, config=elsewhere)) == ["SMoE"]
    # Sizes that no field of the configuration explains, other data, what a record does not repeat from its own label.
    wide = result("smoe", *values, parameters={**short["parameters"], "total": 8_000_000})
    assert labels(short, wide)[1] == "SMoE, parameters 8000000, k 1 2 4 8 16"
    moved = result("smoe", *values, dataset={"name": "enwik8", "sha256": "f" * 64})
    assert labels(short, moved)[1] == "SMoE, dataset.sha256 ffffffff"
    named = result("smoe", *values, label="SMoE, k_max 16", config={"k_max": 16})
    assert labels(short, thor, named)[2] == "SMoE, k_max 16"
    named = result("smoe", *values, label="SMoE, k_max 16", config={"k_max": 1})
    assert labels(short, thor, named)[2] == "SMoE, k_max 16, k_max 1"


def test_a_setting_that_is_not_set_is_said_only_where_most_have_it():
    values = (1.45, 1.32, 1.23, 1.1776, 1.1486)
    own = result("smoe_dropout", *values, config={"router": None})
    routed = [result("smoe_dropout", *values, config={"router": router}) for router in ("hash", "uniform")]
    assert labels(own, routed[0]) == ["SMoE-Dropout", "SMoE-Dropout, router hash"]
    assert labels(own, *routed) == ["SMoE-Dropout", "SMoE-Dropout, router hash", "SMoE-Dropout, router uniform"]
    same = [result("smoe_dropout", *values, config={"router": "hash", "residual_dropout": p}) for p in (0.1, 0.2)]
    assert labels(own, *same)[0] == "SMoE-Dropout, own router"
    set_in_most = [result("smoe_dropout", *values, config={"decay": "cosine", "steps": steps}) for steps in (2, 3)]
    assert labels(own, *set_in_most)[0] == "SMoE-Dropout, decay not set, steps 20"


def test_the_papers_numbers_stand_beside_its_own_scale_only(results):
    assert "paper" not in slimming_table(results)
    at_paper = [{**content, "scale": "paper"} for content in results]
    lines = slimming_table(at_paper).splitlines()
    assert lines[5].endswith("  1.1623") and lines[5].count("1.1623") == 2
    assert lines[6].endswith("k=8: 1.1776  k=16: 1.1486")
    assert lines[7].split()[-1] == "-"  # an ablation is not in the paper's row
    accuracy = classified(valid=dict(zip(KS, (0.7, 0.7, 0.7, 0.8, 0.81), strict=True))) | {"scale": "paper"}
    assert slimming_table([accuracy]).endswith("k=16: 0.7998")


def test_models_and_scales_are_never_mixed(results):
    text = slimming_table([*results, result("thor", 5, 4, 3, 2, 1, scale="smoke"), result("thor", 9.0, model="bert")])
    assert text.count("Test BPC") == 3
    assert "k=1" not in text.rpartition("Test BPC")[2]  # a block of dense runs has no k columns


def test_a_metric_without_a_test_split_is_shown_on_valid():
    values = dict(zip(KS, (0.5, 0.6, 0.7, 0.8, 0.9), strict=True))
    for splits in ({"valid": values}, {"valid": values, "test": {}}, {"valid": values, "test": None}):
        lines = slimming_table([classified(n={"valid": 872}, **splits)]).splitlines()
        assert lines[0] == (
            "Valid accuracy (share of n examples, higher is better): transformer_xl on sst2, scale cpu, n = 872"
        )
        assert lines[1] == "There is no test split with labels: the numbers are those of valid."
        assert lines[-1].endswith("0.9000")
    both = classified(valid=values, test={k: 0.25 for k in KS}, n={"valid": 872, "test": 1821})
    assert "0.2500" in slimming_table([both]) and "n = 1,821" in slimming_table([both])


# ---- records of earlier versions


def old(model: str, **fields) -> dict:
    record = result("smoe_dropout", 1.45, 1.32, 1.23, 1.1776, 1.1486, model=model)
    test = record.pop("metrics")["bpc"]["test"]
    del record["task"], record["metric"]
    bpc = {"valid": {k: value + 1 for k, value in test.items()}, "test": test}
    return record | {"bpc": bpc, "best": {"best_step": 500, "best_bpc": 2.1486}, **fields}


@pytest.mark.parametrize("model, key", [("transformer_xl", "bpc"), ("bert", "bits_per_masked_token")])
def test_a_record_of_an_earlier_version_is_read_in_todays_form(tmp_path, model, key):
    (tmp_path / "result.json").write_text(json.dumps(old(model)))
    record = read_result(tmp_path)
    assert record["metric"] == key and "bpc" not in record
    assert record["metrics"][key]["test"]["16"] == 1.1486 and record["metrics"][key]["valid"]["16"] == 2.1486
    assert record["best"] == {"step": 500, "metric": key, "value": 2.1486, "k": 16}
    assert check_result(old(model)) == record == check_result(record)


def test_bert_is_measured_in_bits_per_masked_token():
    text = slimming_table([old("roberta", eval_sequences=1536)])
    title = "Test bits per masked token (lower is better): roberta on enwik8, scale cpu, eval_sequences 1,536\n"
    assert text.startswith(title) and "BPC" not in text
    at_paper = slimming_table([old("bert", scale="paper")])
    assert at_paper.endswith("k=8: 7.6372  k=16: 7.6293")


# ---- what is wrong with a record


@pytest.mark.parametrize(
    "path, value, words",
    [
        (["method"], None, "method is missing"),
        (["model"], 3, "model is 3; it must be text"),
        (["metrics"], None, "metrics is missing"),
        (["metrics"], [], "metrics is []; it must be metrics by name"),
        (["metric"], "loss", "metrics.loss is missing, the metric that decides"),
        (["metric"], "a\x1b[2J\n", r"metric is 'a\x1b[2J\n'; it must be printable text"),
        (["metrics", "bpc", "title"], None, "metrics.bpc.title is None; it must be text"),
        (["metrics", "bpc", "direction"], "up", "metrics.bpc.direction is 'up'; it must be lower or higher"),
        (["metrics", "bpc", "test"], [1], "metrics.bpc.test is [1]; it must be a number for each k"),
        (["metrics", "bpc", "test"], {"half": 1.0}, "metrics.bpc.test has key 'half'; it must be a number of experts"),
        (["metrics", "bpc", "test"], {"01": 1.0}, "metrics.bpc.test has key '01'"),
        (["metrics", "bpc", "test", "8"], "low", "metrics.bpc.test.8 is 'low'; it must be a number"),
        (["metrics", "bpc", "test", "8"], float("nan"), "metrics.bpc.test.8 is nan; it must be a number"),
        (["metrics", "bpc", "test", "8"], 10**400, "metrics.bpc.test.8 is 1000"),
        (["metrics", "bpc", "n", "test"], 0, "metrics.bpc.n.test is 0; it must be a whole number of at least 1"),
        (["metrics", "bpc", "n"], 5, "metrics.bpc.n is 5; it must be a number for each split"),
        (["parameters", "total"], None, "parameters.total is missing"),
        (["parameters", "active_per_k"], None, "parameters.active_per_k.1 is missing"),
        (
            ["parameters", "active_per_k", "16"],
            None,
            "parameters.active_per_k.16 is missing, while metrics.bpc.test has k = 16",
        ),
        (["seed"], "one", "seed is 'one'; it must be a whole number"),
        (["label"], ["x"], "label is ['x']; it must be text"),
        (["config"], "steps 3", "config is 'steps 3'; it must be fields"),
        (["dataset", "name"], None, "dataset.name is None; it must be text"),
    ],
)
def test_a_missing_or_alien_field_is_named(results, tmp_path, path, value, words):
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
        assert str(caught.value).startswith(f"result 2: {words}") and "\n" not in str(caught.value)
    assert not (tmp_path / "a.png").exists()


def test_neither_split(results):
    del results[0]["metrics"]["bpc"]["test"], results[0]["metrics"]["bpc"]["valid"]
    with pytest.raises(ValueError, match="result 1: metrics.bpc has neither test nor valid; it must have a number"):
        slimming_table(results)


def test_an_old_record_of_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="result 1: model is 'gpt'; with bpc it must be one of transformer_xl, bert"):
        slimming_table([old("gpt")])
    with pytest.raises(ValueError, match="result 1: bpc is 3; it must hold valid and test"):
        slimming_table([old("bert", bpc=3)])


def test_text_in_a_record_stays_text(results, tmp_path):
    evil = "a\n```\n<!-- end -->\n| b | $\\frac{1}$ \x1b[31m\u202e\ud800" + 200 * "x"
    texts = {"label": evil, "model": evil, "scale": evil, "dataset": {"name": evil}, "method": evil}
    record = results[1] | texts
    record["metrics"]["bpc"] |= {"title": evil, "unit": evil}
    table = slimming_table([record])
    table.encode()  # no lone surrogate
    assert not any(mark in table for mark in ("`", "<", "|", "\x1b", "\u202e"))
    lines = table.splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines[2:]}) == 1 and max(map(len, lines)) < 600
    markdown = "<!-- mine: here -->\n<!-- end -->\nafter\n"
    once = with_block(markdown, "mine", table)
    assert with_block(once, "mine", "short") == "<!-- mine: here -->\n```\nshort\n```\n<!-- end -->\nafter\n"
    assert plot_slimming([record], tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---- figures


def test_figure_shows_every_group_once_and_the_mean_of_seeds(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    narrow = result("dense_dropout", 1.4, parameters={"total": 3.3e6}, config={"d_hidden": 64})
    accuracy = classified(valid=dict(zip(KS, (0.5, 0.6, 0.7, 0.8, 0.9), strict=True)))
    plot_slimming([*results, narrow, result("thor", 2.0, scale="smoke"), accuracy], tmp_path / "a.png")
    axes, other, third = drawn[0].axes
    names = ["Dense w. Dropout", "Dense w. Dropout, d_hidden 64", "SMoE-Dropout", "SMoE-Dropout, router hash"]
    assert sorted(text.get_text() for text in axes.texts) == names
    assert axes.get_ylabel() == "test BPC (bits per byte, lower is better)"
    assert third.get_ylabel() == "valid accuracy (share of n examples, higher is better)"
    assert third.get_title(loc="left") == "transformer_xl on sst2, scale cpu"
    curve = axes.lines[2]  # after the first dense model's dot and level
    assert list(curve.get_xdata()) == [3.25, 3.5, 4.0, 5.0, 7.0]
    assert list(curve.get_ydata()) == pytest.approx([1.44, 1.31, 1.22, 1.1738, 1.1443])
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    assert edges[:, 1].min() == 1.14 and edges[:, 1].max() == 1.45
    colors = {line.get_color() for line in axes.lines}
    assert len(axes.lines) == 6 and len(colors) == 4  # two curves, and a dot and its level for each dense model
    assert len(other.lines) == 2
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.06  # labels do not overlap


def test_lines_differ_without_colour(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    values = (1.45, 1.32, 1.23, 1.1776, 1.1486)
    runs = [result(method, *values) for method in ("smoe", "thor", "smoe_dropout")]
    plot_slimming([*runs, results[3]], tmp_path / "a.png")
    lines = drawn[0].axes[0].lines
    assert len(lines) == 4
    assert len({line.get_marker() for line in lines}) == len({str(line._dash_pattern) for line in lines}) == 4


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figure_is_written(results, tmp_path, ending, start):
    path = plot_slimming(results[:2], tmp_path / f"a.{ending}")
    assert path.read_bytes().startswith(start)


# ---- the command


def test_command_prints_table_or_json(runs, capsys, tmp_path):
    main([*runs[:2], str(tmp_path / "run2" / "result.json")])
    assert "1.1443" in capsys.readouterr().out
    main([*runs, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in rows] == ["Dense w. Dropout", "SMoE-Dropout", "SMoE-Dropout, router hash"]
    row = rows[1]
    assert (row["metric"], row["split"], row["n"], row["seeds"], row["runs"]) == ("bpc", "test", 2000, [0, 1], 2)
    assert row["mean"]["16"] == pytest.approx(1.1443)
    assert row["standard_deviation"]["16"] == pytest.approx(stdev([1.1486, 1.14]))
    assert rows[0]["mean"] == {"dense": 1.1623} and rows[0]["standard_deviation"] is None


def test_command_writes_into_a_markdown_file(runs, capsys, tmp_path):
    file = tmp_path / "a.md"
    file.write_text("before\n<!-- cpu: by hand -->\nold\n<!-- end -->\nafter\n")
    main([*runs, "--into", str(file), "--block", "cpu"])
    table = capsys.readouterr().out.rstrip("\n")
    assert file.read_text() == f"before\n<!-- cpu: by hand -->\n```\n{table}\n```\n<!-- end -->\nafter\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "run: nowhere does not exist"),
        (["RUN", "nowhere"], "run: nowhere does not exist"),
        (["RUN", "--plot", "a.xyz"], "plot: a.xyz ends in '.xyz'; it must be .png, .pdf or .svg"),
        (["RUN", "--plot", "no/folder/a.png"], "no/folder/a.png: No such file or directory"),
        ([], "the following arguments are required: RUN"),
        (["RUN", "--plt"], "unrecognized arguments: --plt"),
        (["RUN", "--into", "a.md"], "--into and --block must be given together"),
        (["RUN", "--block", "a"], "--into and --block must be given together"),
        (["RUN", "--into", "a.md", "--block", "a"], "a.md: No such file or directory"),
        (["RUN", "--into", "a.md", "--block", "a", "--json"], "--into has no effect with --json"),
        (["RUN", "--into", "README", "--block", "other", "--plot", "PLOT"], "block is 'other'; the file must have"),
    ],
)
def test_command_ends_with_one_line_for_bad_input(runs, capsys, tmp_path, arguments, words):
    readme, plot = tmp_path / "README.md", tmp_path / "a.png"
    readme.write_text("<!-- cpu: -->\n<!-- end -->\n")
    places = {"RUN": runs[0], "README": str(readme), "PLOT": str(plot)}
    assert_main_refuses(main, [places.get(argument, argument) for argument in arguments], words, capsys)
    assert not plot.exists()  # nothing half-written


def test_command_leaves_out_what_it_cannot_report_and_says_so(runs, tmp_path, capsys):
    (tmp_path / "run1" / "result.json").write_text('{"method": "smoe"}')
    (tmp_path / "run2" / "result.json").write_text("{")
    (tmp_path / "run3" / "result.json").unlink()
    main(runs)
    out, err = capsys.readouterr()
    assert "1.1623" in out and "1.4500" not in out
    first, second, third = err.splitlines()
    assert first == f"warning: left out: {runs[1]}: model is missing"
    assert second.startswith(f"warning: left out: run: {runs[2]}/result.json is not JSON")
    assert third.startswith(f"warning: left out: run: {runs[3]}/result.json does not exist; a run writes it when it")
    with pytest.raises(ValueError, match=r"^\S*run1: model is missing$"):
        main(runs[1:2])
    with pytest.raises(ValueError, match=r"^no run can be reported; the first: \S*run1: model is missing$"):
        main(runs[1:])
    assert capsys.readouterr().out == ""
