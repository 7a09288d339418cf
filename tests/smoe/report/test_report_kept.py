"""Figure 4 and the plot of pretrained encoders, from made-up records: which points, of which folds, with which bars."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest
from made_up import fine_tuned
from made_up_transfer import ALL, PAPER, answers, of_sst2, run, write

from smoe.methods import METHODS
from smoe.report.collect import collect
from smoe.report.kept import kept_plots
from smoe.report.statistics import wilson_interval
from smoe.report.transfer import columns_of


def figure4(folder, records: list[dict]):
    write(folder, records)
    (plot,) = kept_plots("figure4", columns_of(collect(folder)[0]))
    return plot


def test_figure_4_is_over_kept_experts_with_error_bars(tmp_path):
    (panel,) = figure4(tmp_path, of_sst2()).rows[0]
    lines = {line.label: line for line in panel.lines}
    ours, dense = lines["SMoE-Dropout, kept experts"], lines["Dense w. Dropout"]
    assert [point.x for point in ours.points] == [1, 2, 4, 8, 16] and [point.x for point in dense.points] == [16]
    assert ours.points[4].spread == (stdev(ours.points[4].values),) * 2
    (share,) = ours.points[0].values
    low, high = wilson_interval(round(400 * share), 400)
    assert ours.points[0].spread == pytest.approx((share - low, high - share))


def test_figure_4_shows_what_was_kept_else_what_one_training_activates(tmp_path):
    right = {str(k): answers(0.3 + 0.02 * k, 80, k) for k in (1, 2, 4, 8, 16)}
    wholes = lambda method, **fields: fine_tuned(method, right=right, **PAPER, **fields)  # noqa: E731
    scaled = {"output_scale": "num_experts"}
    records = [run("dense_dropout", 0.5, 80, **PAPER), run("dense_dropout", 0.4, 80, d_hidden=512, **PAPER)]
    records += [run("dense_dropout", 0.4, 80, num_layers=8, **PAPER), run("smoe", 0.4, 80, k_max=8, **PAPER)]
    records += [run("smoe", 0.3, 80, num_experts=8, d_hidden=512, **PAPER)]
    records += [wholes("thor"), wholes("smoe"), wholes("smoe_dropout", **scaled)]
    records += [run("smoe", 0.4, 80, keep=keep, **PAPER) for keep in (2, 8)]
    records += [run("smoe_dropout", 0.4, 80, keep=keep, output_scale=16.0, **PAPER) for keep in (2, 8)]
    (panel,) = figure4(tmp_path, records).rows[0]
    assert {line.label: [(point.x, point.key) for point in line.points] for line in panel.lines} == {
        "Dense w. Dropout": [(8, "dense"), (16, "dense")],
        "THOR, activated experts": [(k, str(k)) for k in (1, 2, 4, 8, 16)],
        "SMoE, kept experts": [(k, str(k)) for k in (2, 8, 16)],
        "SMoE-Dropout, output_scale num_experts, kept experts": [(k, str(k)) for k in (2, 8, 16)],
    }


def test_figure_4_pools_the_folds_that_all_lines_have(tmp_path):
    of_mawps = {"model": "bert", "dataset": "mawps", "task": "math_word_problems", "metric": "solving_rate"}
    keys = ("8", "16")
    sizes, records = {"0": 60, "1": 90, "2": 30, "3": 40, "4": 50}, []
    lines = (("dense_dropout", None, "012"), ("smoe_dropout", None, "014"), ("smoe_dropout", 8, "014"))
    for method, keep, folds in (*lines, ("thor", None, "013")):
        for fold, seed in ((fold, seed) for fold in folds for seed in (1, 2)):
            own = ("dense",) if method == "dense_dropout" else keys[: 1 if keep else 2]
            right = {key: answers(0.3 + 0.1 * i, sizes[fold], (fold, seed, method)) for i, key in enumerate(own)}
            record = fine_tuned(method, seed, right=right, keep=keep, fold=fold, **of_mawps, **ALL)
            records += [record | {"said": right}]
    (thor, *_) = [record for record in records if record["method"] == "thor"]
    thor["best_at_other_k"] = [{"k": 16, "metrics": {"solving_rate": {"test": {"16": 0.9}}}}]
    other = {"model": "roberta", "dataset": "svamp", **{name: of_mawps[name] for name in ("task", "metric")}, **ALL}
    right = {key: answers(0.4, 50, key) for key in ("8", "16")}
    alone = [run("dense_dropout", 0.4, 50, fold=fold, **other) for fold in ("0", "challenge")]
    alone += [fine_tuned("smoe", right=right, fold=fold, **other) | {"said": right} for fold in ("1", "challenge")]
    plot = figure4(tmp_path, [*records, *alone])  # of the folds 0 and 1 the two have none in common
    panel, challenge = plot.rows[0]
    folds = "bert on mawps, scale cpu, setting all, 2 of 5 folds"
    assert plot.titles() == [[folds, "roberta on svamp, scale cpu, setting challenge"]]
    assert [line.label for line in challenge.lines] == ["Dense w. Dropout", "SMoE, activated experts"]
    lines = {line.label: line.points for line in panel.lines}
    places = {label: [(point.x, point.key) for point in points] for label, points in lines.items()}
    assert places == {
        "Dense w. Dropout": [(16, "dense")],
        "SMoE-Dropout, kept experts": [(8, "8"), (16, "16")],
        "THOR, activated experts": [(8, "8"), (16, "16")],
    }
    for label, points in lines.items():
        for point in points:
            kept = 8 if point.key == "8" and "kept" in label else None
            of_point = [r for r in records if METHODS[r["method"]].title in label and r["config"]["keep"] == kept]
            shares = []
            for seed in (1, 2):
                of_seed = [r for r in of_point if r["seed"] == seed and r["config"]["fold"] in "01"]
                shares.append(fmean(x for r in of_seed for x in r["said"][point.key]))
            assert sorted(point.values) == pytest.approx(sorted(shares))
    assert lines["THOR, activated experts"][0].tuned.values()[0] == pytest.approx(
        (0.9 * 60 + 90 * fmean(records[-4]["said"]["16"])) / 150
    )


def test_figure_4_takes_the_folds_with_which_most_is_shown(tmp_path):
    of_mawps = {"model": "bert", "dataset": "mawps", "task": "math_word_problems", "metric": "solving_rate"}
    one = lambda method, fold, **f: run(method, 0.4, 60 + int(fold), fold=fold, **of_mawps, **ALL, **f)  # noqa: E731
    kinds = [{"method": "dense_dropout"}, {"method": "smoe_dropout"}, {"method": "smoe_dropout", "keep": 8}]
    whole = [one(fold=fold, **kind) for kind in kinds for fold in "01234"]
    more = [one("dense_dropout", "0", seed=2), one("smoe_dropout", "3", keep=4), one("smoe", "2", keep=8)]
    plot = figure4(tmp_path, [*whole, *more])
    (panel,) = plot.rows[0]
    assert plot.titles() == [["bert on mawps, scale cpu, setting all"]]
    values = {line.label: [point.values for point in line.points] for line in panel.lines}
    share = lambda records: [fmean(x for r in records for x in next(iter(r["said"].values())))]  # noqa: E731
    assert values == {"Dense w. Dropout": [pytest.approx(share(whole[:5]))],
                      "SMoE-Dropout, kept experts": [pytest.approx(share(whole[10:])),
                                                     pytest.approx(share(whole[5:10]))]}  # fmt: skip


def test_figure_4_draws_what_was_kept_alone_and_bars_at_each_k(tmp_path):
    right = {str(k): answers(0.1 * k, 80, k) for k in (2, 4, 8)}
    records = [run("dense_dropout", 0.5, 80, **PAPER), run("smoe", 0.4, 80, keep=8, **PAPER)]
    thor = fine_tuned("thor", right=right | {"16": answers(0.9, 80, 16)}, **PAPER)
    lost, odd = fine_tuned("smoe_dropout", right=right, **PAPER), fine_tuned("smoe_dropout", right=right, **PAPER)
    odd["metrics"]["accuracy"]["test"] = {"4": 1.5, "16": 0.5}  # no share
    lost["seed"] = 2  # not measured with all of its experts
    (panel,) = figure4(tmp_path, [*records, thor, lost, odd]).rows[0]
    lines = {line.label: line.points for line in panel.lines}
    assert list(lines) == ["Dense w. Dropout", "SMoE, kept experts", "THOR, activated experts"]
    assert [point.key for point in lines["SMoE, kept experts"]] == ["8"]
    for point, (key, said) in zip(lines["THOR, activated experts"], right.items(), strict=False):
        low, high = wilson_interval(sum(said), 80)
        assert point.key == key and point.spread == pytest.approx((fmean(said) - low, high - fmean(said)))
