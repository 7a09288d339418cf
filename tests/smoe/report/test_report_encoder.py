"""A pretrained encoder in the report, from made-up records."""

from __future__ import annotations

import json
import re
from statistics import fmean, stdev

import pytest
from made_up_transfer import ALL, answers, report_of, rows_of, run, shown_p, table2, write
from markdown_it import MarkdownIt

from smoe.report import write_report
from smoe.report.collect import collect
from smoe.report.command import part_text
from smoe.report.kept import kept_plots
from smoe.report.statistics import wilson_interval
from smoe.report.transfer import FOLDS, columns_of


def of_encoder(seeds=(1, 2, 3), n=400) -> list[dict]:
    """An encoder on SST-2: dense, and SMoE-Dropout with 16 experts at three k, and with 8 and 4 that were kept."""
    fields, records = {"model": "bert", **ALL}, []
    for seed in seeds:
        for method, keep, share in (("dense_dropout", None, 0.9), ("smoe_dropout", None, 0.89),
                                    ("smoe_dropout", 8, 0.85), ("smoe_dropout", 4, 0.8)):  # fmt: skip
            record = run(method, share, n, seed, keep=keep, **fields)
            if method == "smoe_dropout" and keep is None:
                record["said"] = {"4": answers(0.5, n, seed), "8": answers(0.6, n, seed), **record["said"]}
                for of_k in record["metrics"]["accuracy"].values():
                    if "16" in of_k:
                        of_k |= {k: fmean(right) for k, right in record["said"].items()}
            record["pretrained"]["start_from"] = "all-MiniLM-L6-v2"
            records.append(record)
    return records


def test_a_pretrained_encoder_has_a_section_and_a_plot_of_its_own(tmp_path):
    records = of_encoder()
    results, figures = tmp_path / "results", tmp_path / "Figs"
    figures.mkdir()
    write(results, [*records, *table2(ALL, columns=[("bert", "csqa")])])
    cost = {"encoder": "all-MiniLM-L6-v2", "dataset": "sst2", "scale": "cpu", "method": "smoe_dropout"}
    cost |= {"megabytes": 12.5, "milliseconds": 1.5}
    times = [{**cost, "scale": "paper", "experts": 8, "k": 8, "milliseconds": 9.0}, {**cost, "experts": 8, "k": 8}]
    times += [{**cost, "experts": 16, "k": 8, "milliseconds": 2.5}]
    (results / "encoder_times.json").write_text(json.dumps({"records": times}))
    written, problems = write_report(results, figures)
    assert problems == [] and {figures / f"encoder_cpu.{ending}" for ending in ("png", "svg")} <= {*written}
    report = (results / "REPORT.md").read_text()
    assert "](../Figs/encoder_cpu.png)" in report and "## Other runs" not in report
    rows = rows_of(report, "A pretrained encoder", "all-MiniLM-L6-v2, sst2, scale cpu")
    places = [(row["experts"], row["activated"]) for row in rows]
    assert places == [("-", "-"), ("16", "16"), ("8", "8"), ("4", "4"), ("16", "8"), ("16", "4")]
    said = {place: [] for place in places}
    for record in records:
        experts = "-" if record["method"] == "dense_dropout" else str(record["config"]["num_experts"])
        for k, right in record["said"].items():
            said[experts, "-" if k == "dense" else k].append(right)
    dense = said["-", "-"]
    for row, place in zip(rows, places, strict=True):
        shares = [100 * fmean(right) for right in said[place]]
        assert row["ours"] == f"{shares[0]:.2f}" and row["n"] == "400"
        assert row["over seeds"] == f"{fmean(shares):.2f} ± {stdev(shares):.2f} (n = 3)"
        if place[0] == place[1] != "-":
            difference = fmean(shares) - 100 * fmean(map(fmean, dense))
            assert row["to dense"] == f"{difference:+.2f}" and row["p"] == shown_p(said[place][0], dense[0])
        else:
            assert row["to dense"] == "-"
    costs = {place: (row["MB"], row["ms"]) for row, place in zip(rows, places, strict=True)}
    assert costs["8", "8"] == ("12.50", "1.50")
    assert costs["16", "8"][1] == "2.50" and costs["16", "16"] == ("missing", "missing")
    text = part_text("encoder", str(results))
    named = "all-MiniLM-L6-v2, sst2, scale cpu, setting all: accuracy, mean ± deviation over seeds, %"
    assert text.splitlines()[0] == named
    lines = [re.split(r" {2,}", line) for line in text.splitlines()[4:]]
    assert [tuple(line[1:3]) for line in lines] == places
    for line, row, place in zip(lines, rows, places, strict=True):
        shares = [100 * fmean(right) for right in said[place]]
        assert line[3:5] == ["400", f"{fmean(shares):.2f} ± {stdev(shares):.2f} (n = 3)"]
        assert line[5:] == [row["to dense"], row["95 % of the difference"], row["MB"], row["ms"]]
    # Table 2 and its claims are about the paper's models alone.
    cells = rows_of(report, "Table 2", "Scale cpu, setting `all`")
    assert "MiniLM" not in str(cells) and {r["ours"] for r in cells if r["task"] == "transformer\\_xl, sst2"} == {
        "missing"
    }
    assert [column.name for column in columns_of(collect(results)[0])] == ["bert, csqa"]
    (figure4,) = kept_plots("figure4", columns_of(collect(results)[0]))
    assert [panel.context.dataset for panel in figure4.rows[0]] == ["csqa"]


def encoder_plots(folder):
    return kept_plots("encoder", columns_of(collect(folder)[0], encoders=True), sweep_all=True)


def test_one_seed_of_an_encoder_has_bars_and_damaged_times_are_said(tmp_path):
    (tmp_path / "Figs").mkdir()
    write(tmp_path / "results", of_encoder(seeds=(1,)))
    row = {"encoder": "x", "dataset": "sst2", "scale": "cpu", "method": "smoe_dropout", "megabytes": 2}
    times = [{**row, "milliseconds": -1}]
    (tmp_path / "results" / "encoder_times.json").write_text(json.dumps({"records": times}))
    _, problems = write_report(tmp_path / "results", tmp_path / "Figs")
    assert problems == ["encoder_times.json: records.0.milliseconds is -1; it must be a number of at least 0"]
    (plot,) = encoder_plots(tmp_path / "results")
    dense, kept, swept = plot.rows[0][0].lines
    assert [[point.x for point in line.points] for line in (dense, kept, swept)] == [[16], [4, 8, 16], [4, 8, 16]]
    for point in kept.points:
        low, high = wilson_interval(round(400 * point.values[0]), 400)
        assert point.spread == pytest.approx((point.values[0] - low, high - point.values[0]))


def test_an_encoder_with_missing_folds_or_another_schedule_says_so(tmp_path):
    fields = {"model": "bert", "dataset": "mawps", "task": "math_word_problems", "metric": "solving_rate", **ALL}
    records = [run("dense_dropout", 0.5, 80, fold=str(fold), **fields) for fold in range(FOLDS)]
    records += [run("smoe_dropout", 0.5, 80, fold=str(fold), **fields) for fold in range(FOLDS)]
    records += [run("smoe_dropout", 0.5, 80, fold=str(fold), keep=8, **fields) for fold in range(2)]
    records += [run("smoe_dropout", 0.4, 80, fold=str(fold), growing=True, **fields) for fold in range(FOLDS)]
    for record in records:
        record["pretrained"]["start_from"] = "MiniLM"
        if "k_schedule" in record["pretrained"]:
            record["pretrained"]["k_schedule"] = [1, 16, "linear"]
    report = report_of(tmp_path, records)
    rows = rows_of(report, "A pretrained encoder", "MiniLM, mawps, scale cpu")
    said = [(row["method"], row["experts"], row["n"]) for row in rows]
    other = "SMoE-Dropout, pretrained with k = 1..16 linear"
    assert said == [("Dense w. Dropout", "-", "400"), ("SMoE-Dropout", "16", "400"),
                    ("SMoE-Dropout", "8", "160 (2 of 5 folds)"), (other, "16", "400")]  # fmt: skip
    assert encoder_plots(tmp_path) == []  # most is shown with all folds, which is all at one number of experts
    for fold in range(2, FOLDS):
        records.append(run("smoe_dropout", 0.5, 80, fold=str(fold), keep=8, **fields))
        records[-1]["pretrained"]["start_from"] = "MiniLM"
    write(tmp_path, records)
    (plot,) = encoder_plots(tmp_path)
    assert plot.rows[0][0].context.label == "MiniLM on mawps, scale cpu, setting all"
    lines = {line.label: [point.x for point in line.points] for line in plot.rows[0][0].lines}
    assert lines == {"Dense w. Dropout": [16], "SMoE-Dropout, kept experts": [8, 16],
                     "SMoE-Dropout, activated experts": [16],
                     f"{other}, activated experts": [16]}  # fmt: skip


def test_the_name_of_an_encoder_is_only_text(tmp_path):
    records = of_encoder(seeds=(1,))
    for record in records:
        record["pretrained"]["start_from"] = "<img src=x> | [a](http://b) **e** `f`"
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(report_of(tmp_path, records))
    inside = [child for token in tokens for child in token.children or []]
    assert not [token for token in [*tokens, *inside] if token.type.startswith("html")]
    assert "http://b" not in {child.attrs.get("href") for child in inside}
    assert any("img src=x" in child.content for child in inside)
