"""Tables 2, 3, A4, A5 and A6 from made-up records, and what becomes of the paper's claims about transfer."""

from __future__ import annotations

import json
from statistics import fmean, stdev

import pytest
from made_up import fine_tuned
from made_up_transfer import ALL, COLUMNS, KINDS, PAPER, TASK, of_sst2, report_of, rows_of, run, shown_p, table2, write

from bert.question_answering import compositionality
from smoe.paper import paper_results
from smoe.report import main, slimming_table
from smoe.report.checks import check_words
from smoe.report.collect import collect
from smoe.report.statistics import mean_interval, paired_bootstrap, wilson_interval
from smoe.report.transfer import ROWS, columns_of
from smoe.report.transfer_claims import summary, transfer_findings


def test_table_2_has_every_cell_in_both_settings(tmp_path):
    records = table2(PAPER) + table2(ALL)
    report = report_of(tmp_path, records)
    assert "## Other runs" not in report
    for setting, fields in (("paper", PAPER), ("all", ALL)):
        rows = rows_of(report, "Table 2", f"Scale cpu, setting `{setting}`")
        assert len(rows) == 40 and "missing" not in str(rows)
        for i, (model, dataset) in enumerate(COLUMNS):
            for row, shown in zip(ROWS, rows[5 * i : 5 * i + 5], strict=True):
                method, keep, _ = KINDS[row]
                mine = [
                    r for r in records if (r["model"], r["dataset"]["name"], r["method"]) == (model, dataset, method)
                ]
                mine = [r for r in mine if r["config"].items() >= {"keep": keep, **fields}.items()]
                dense = [r for r in records if (r["model"], r["dataset"]["name"]) == (model, dataset)]
                dense = [r for r in dense if r["method"] == "dense_dropout" and r["config"].items() >= fields.items()]
                assert len(mine) == len(dense) == (5 if setting == "all" and dataset not in TASK else 1)
                right, base = ([x for r in side for of_k in r["said"].values() for x in of_k] for side in (mine, dense))
                n, share, printed = len(right), fmean(right), paper_results()["table2"][model][dataset][row]
                low, high = wilson_interval(sum(right), n)
                assert shown["task"] == f"{model}, {dataset}".replace("_", "\\_") and shown["n"] == str(n)
                assert shown["paper"] == f"{printed:.2f}" and shown["ours"] == f"{100 * share:.2f}"
                assert shown["95 %"] == f"{100 * low:.2f} to {100 * high:.2f}"
                assert shown["difference"] == f"{100 * share - printed:+.2f}"
                assert shown["beats its floor"] == "yes" and shown["floor"] == "30.00 (most frequent)"
                if method != "dense_dropout":
                    low, high = paired_bootstrap(right, base)
                    assert shown["to dense"] == f"{100 * (share - fmean(base)):+.2f}"
                    assert shown["p"] == shown_p(right, base)
                    assert shown["95 % of the difference"] == f"{100 * low:+.2f} to {100 * high:+.2f}"


def test_what_is_not_there_is_missing_and_a_floor_that_is_not_beaten_is_said(tmp_path):
    records = table2(PAPER, columns=COLUMNS[:2])[:7]
    for i, floor in enumerate((0.9, None, 0.3)):
        records[i]["floors"] = {} if floor is None else {"chance": {"test": 0.1}, "bag_of_words": {"test": floor}}
    records[2]["floors"]["bag_of_words"]["test"] = fmean(records[2]["said"]["16"]) - 0.001
    del records[6]["said"]  # no predictions
    damaged = [*records, *table2(ALL, columns=[("bert", "mawps")])[:3]]
    report = report_of(tmp_path, damaged)
    rows = rows_of(report, "Table 2", "Scale cpu, setting `paper`")
    assert [row["beats its floor"] for row in rows[:3]] == ["**no**", "missing", "within noise"]
    assert rows[0]["floor"] == "90.00 (bag of words)"
    assert rows[6]["ours"] != "missing" and rows[6]["to dense"] != "missing" and rows[6]["p"] == "missing"
    assert rows[7]["paper"] == "29.27" and {*list(rows[7].values())[3:]} == {"missing"}
    pooled = rows_of(report, "Table 2", "Scale cpu, setting `all`")
    (dense,) = (row for row in pooled if row["task"] == "bert, mawps" and row["method"] == "Dense w. Dropout")
    assert dense["n"] == "453 (3 of 5 folds)"


def test_a_variant_of_a_method_has_a_row_of_its_own_without_the_papers_number(tmp_path):
    records = table2(PAPER, columns=COLUMNS[:1])
    records = [r for r in records if (r["method"], r["config"]["keep"]) != ("smoe_dropout", None)]
    records += [run("smoe_dropout", 0.6, 150, output_scale="num_experts", expert_dropout=0.1, **PAPER)]
    records += [run("smoe_dropout", 0.6, 150, keep=8, output_scale=16.0, expert_dropout=0.1, **PAPER)]
    rows = rows_of(report_of(tmp_path, records), "Table 2", "Scale cpu, setting `paper`")[:6]
    half, variant, full = rows[3:]
    assert (half["method"], half["paper"]) == ("SMoE-Dropout (k = 8 of 16)", "81.60")
    words = "output\\_scale num\\_experts, expert\\_dropout 0.1"
    assert [row["method"] for row in (variant, full)] == [f"SMoE-Dropout (k = {k} of 16), {words}" for k in (8, 16)]
    assert variant["paper"] == full["paper"] == variant["difference"] == "-"


def test_only_runs_of_the_standard_size_and_usual_votes_are_in_the_papers_rows(tmp_path):
    records = table2(PAPER, columns=COLUMNS[:1])
    others = [
        run("dense_dropout", 0.2, 150, d_hidden=256, **PAPER),
        run("dense_dropout", 0.2, 150, num_layers=8, **PAPER),
        run("smoe_dropout", 0.9, 150, num_layers=8, **PAPER),
        run("smoe_dropout", 0.3, 150, num_experts=8, d_hidden=512, **PAPER),
        run("smoe_dropout", 0.3, 150, schedule="linear", k_min=8, k_max=16, **PAPER),
    ]
    for i, order in enumerate(([*records, *others], [*others, *records])):
        report = report_of(tmp_path / str(i), order)
        assert rows_of(report, "Table 2", "Scale cpu, setting `paper`") == rows_of(
            report_of(tmp_path / f"without {i}", records), "Table 2", "Scale cpu, setting `paper`"
        )
        assert "5" in report.split("## Other runs")[1]
    weighed = run("smoe_dropout", 0.2, 150, keep=8, vote_score="weight", **PAPER)
    counted = run("smoe_dropout", 0.2, 150, seed=2, keep=8, vote_score="count", vote_batches=64, **PAPER)
    rows = rows_of(report_of(tmp_path / "votes", [weighed, *records, counted]), "Table 2", "Scale cpu, setting `paper`")
    assert [row["method"] for row in rows[3:6]] == [
        "SMoE-Dropout (k = 8 of 16)",
        "SMoE-Dropout (k = 8 of 16), vote\\_score weight",
        "SMoE-Dropout (k = 16 of 16)",
    ]
    assert rows[3]["over seeds"].endswith("(n = 2)") and rows[4]["over seeds"] == "one seed"


def test_values_of_a_comparison_are_of_the_folds_that_both_have(tmp_path):
    of_mawps = {"model": "bert", "dataset": "mawps", "task": "math_word_problems", "metric": "solving_rate", **ALL}
    fold = lambda method, share, i: run(method, share, 100, fold=i, **of_mawps)  # noqa: E731
    records = [fold("dense_dropout", share, str(i)) for i, share in enumerate((0.1, 0.1, 0.9, 0.9, 0.9))]
    records += [fold("smoe_dropout", 0.4, str(i)) for i in range(2)]
    found, _ = findings(tmp_path, records)
    (check,) = (check for check in found["transfer_dense"].checks if check.at)
    right = [[x for r in records[part] for x in next(iter(r["said"].values()))] for part in (slice(5, 7), slice(0, 2))]
    assert check.at == pytest.approx([fmean(side) for side in right])
    assert check.difference.mean == pytest.approx(check.at[0] - check.at[1])


def test_the_papers_numbers_are_those_of_what_was_fine_tuned():
    def last(method, *ks, start_from=None, **fields):
        record = fine_tuned(method, right={k: [True, True, True, True, False] for k in ks}, scale="paper", **fields)
        record["pretrained"] |= {"start_from": start_from}
        return slimming_table([record]).splitlines()[-1].split("  ")[-1].strip()

    assert last("smoe_dropout", "8", "16") == "k=16: 0.8241"
    assert last("smoe_dropout", "4", "8", keep=8) == "k=8: 0.8160"
    assert last("smoe_dropout", "2", "4", keep=4) == "0.8000"  # the paper has no such row
    assert last("dense_dropout", "dense") == "0.8194"
    assert last("dense_dropout", "dense", teacher="smoe_dropout") == "0.8201"
    assert last("dense_dropout", "dense", start_from="MiniLM") == "0.8000"
    assert last("smoe_dropout", "16", output_scale="num_experts") == "0.8000"


def test_table_2_as_text_has_means_over_seeds_and_says_which_folds_there_are(tmp_path, capsys):
    records = table2(PAPER, columns=COLUMNS[:1], seeds=(1, 2)) + table2(ALL, columns=[("bert", "mawps")])[:2]
    write(tmp_path, records)
    (tmp_path / "broken.json").write_text("{")
    main(["--part", "table2", "--results", str(tmp_path)])
    text, said = capsys.readouterr()
    assert said.startswith("warning: left out: broken.json: ")
    shares = [100 * fmean(r["said"]["dense"]) for r in records if "dense" in r["said"] and r["model"] != "bert"]
    assert f"81.94 / {fmean(shares):.1f} ± {stdev(shares):.1f}  " in text and "] (2 of 5 folds)" in text


def test_table_2_as_text_goes_into_a_document(tmp_path, capsys):
    write(tmp_path / "results", records := table2(PAPER, columns=COLUMNS[:1]))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table2: -->\nold\n<!-- end -->\n")
    main(["--part", "table2", "--results", str(tmp_path / "results"), "--into", str(readme), "--block", "table2"])
    text = capsys.readouterr().out
    right = records[0]["said"]["dense"]
    low, high = (100 * value for value in wilson_interval(sum(right), len(right)))
    assert f"transformer_xl, sst2  150  81.94 / {100 * fmean(right):.1f} [{low:.1f}, {high:.1f}]  81.13 / " in text
    assert "bert, csqa" in text and "30.44 / missing" in text and "What the paper says of transfer, in each" in text
    assert readme.read_text() == f"<!-- table2: -->\n```\n{text}```\n<!-- end -->\n"


def test_tables_3_a4_and_a5(tmp_path):
    made = of_sst2()
    report = report_of(tmp_path, made)
    of = lambda **f: [r for r in made if all(r.get(k, r["config"].get(k)) == v for k, v in f.items())]  # noqa: E731
    right = lambda r: next(iter(r["said"].values()))  # noqa: E731
    rows = rows_of(report, "Table 3", "transformer\\_xl, sst2")
    students = {r["teacher"]["method"]: right(r) for r in of(task="distillation")}
    variant = run("dense_dropout", 0.3, 400, teacher="smoe_dropout", d_hidden=64)
    variant["teacher"] |= {"num_experts": 16, "score": "softmax_after_topk", "output_scale": "num_experts"}
    wider = run("dense_dropout", 0.3, 400, teacher="thor", d_hidden=128)
    both = rows_of(report_of(tmp_path / "more", [*made, variant, wider]), "Table 3", "transformer\\_xl, sst2")
    assert both[:-1] == rows and both[-1]["paper"] == "-"
    assert both[-1]["teacher"] == "SMoE-Dropout, output\\_scale num\\_experts"
    for row, (method, printed) in zip(rows, paper_results()["table3"]["sst2"].items(), strict=True):
        assert row["paper"] == f"{printed:.2f}" and row["ours"] == f"{100 * fmean(students[method]):.2f}"
        p = shown_p(students[method], students["dense_dropout"])
        assert row["p"] == ("-" if method == "dense_dropout" else p)
    rows = rows_of(report, "Table A4", "transformer\\_xl, sst2")
    for row, (method, keep, _), printed in zip(
        rows, KINDS.values(), paper_results()["tableA4"]["sst2"].values(), strict=True
    ):
        records = [
            r for r in of(method=method, keep=keep, task="classification") if "k_schedule" not in r["pretrained"]
        ]
        shares = [100 * fmean(right(r)) for r in records]
        low, high = mean_interval(shares)
        assert len(shares) == 3 and row["paper"] == "{:.2f} ± {:.2f}".format(*printed)
        assert (row["mean"], row["standard deviation"]) == (f"{fmean(shares):.2f}", f"{stdev(shares):.2f}")
        assert row["95 % (t)"] == f"{low:.2f} to {high:.2f}" and row["seeds"] == "1, 2, 3 (n = 3)"
    rows = rows_of(report, "Table A5", "transformer\\_xl, sst2")
    assert [row["16"] for row in rows[::2]] == ["81.20", "81.51", "82.32"]
    growing = {r["config"]["num_experts"]: fmean(right(r)) for r in made if "k_schedule" in r["pretrained"]}
    for k, share in growing.items():
        assert rows[3][str(k)].startswith(f"{100 * share:.2f} (")
    assert "missing" not in str(rows) and "(n = 3)" in rows[5]["8"] and "(n = 3)" in rows[1]["16"]


def test_table_a6_has_whatever_metrics_its_records_hold(tmp_path):
    records = []
    for method, share in (("dense_dropout", 0.4), ("smoe_dropout", 0.6)):
        fields = {"model": "bert", "dataset": "hotpotqa", "task": "question_answering", "metric": "exact_match"}
        records.append(run(method, share, 100, **fields))
        key = next(iter(records[-1]["said"]))
        records[-1]["metrics"]["f1"] = {"title": "F1", "unit": "share", "direction": "higher",
                                        "test": {key: 0.55}, "valid": {key: 0.55}}  # fmt: skip
        # As bert.question_answering writes it.
        right = {str(i): i % 3 > 0 for i in range(12)}, {str(i): i % 4 > 0 for i in range(24)}
        records[-1]["compositionality"] = {key: compositionality(*right)}
    records[0]["compositionality"]["dense"]["n"] = "many"
    rows = rows_of(report_of(tmp_path, records), "Table A6", "bert, hotpotqa")
    assert [row["method"] for row in rows] == ["Dense w. Dropout", "SMoE (k = N)", "SMoE-Dropout (k = 16 of 16)"]
    assert [(row["exact match, paper"], row["gap, paper"]) for row in rows] == [
        ("15.10", "14.90"), ("14.90", "15.00"), ("15.20", "14.70")
    ]  # fmt: skip
    assert rows[1]["exact match, ours"] == "missing" and rows[2]["F1"] == "55.00" and rows[2]["n"] == "100"
    # 18 of 24 single-hop questions are right and 8 of 12 multi-hop ones; of 6 with both, 4 are.
    ours = [(row["gap, ours (questions)"], row["gap of Press et al. (n)"]) for row in rows]
    assert ours == [("8.33 (missing)", "33.33 (missing)"), ("missing", "missing"), ("8.33 (12)", "33.33 (6)")]
    assert rows[2]["p to dense"] == "< 0.0001"


def findings(folder, records: list[dict]):
    write(folder, records)
    runs, problems = collect(folder)
    assert problems == []
    found = transfer_findings(columns_of(runs))
    counted, lines = summary(found)
    return {finding.key: finding for finding in found}, "\n".join([counted, *lines])


def test_claims_hold_where_the_records_bear_them(tmp_path):
    found, text = findings(tmp_path, of_sst2())
    words = {key: finding.words for key, finding in found.items()}
    assert words["teacher"] == words["growing_learned"] == "held" and words["questions"] == "not run"
    # Of one of the paper's eight columns nothing follows for the others.
    for key, rows in (("transfer_dense", 1), ("transfer_learned", 2), ("transfer_half", 1)):
        assert words[key] == "not run in full"
        held = [check.status.name for check in found[key].checks]
        assert held == ["HELD"] * rows + ["NOT_RUN"] * 7 * rows
    # Over seeds alone, without the examples.
    assert [check.status.name for check in found["seeds"].checks[:3]] == ["HELD"] * 3 and len(
        found["seeds"].checks
    ) == 6
    assert (
        "Held, as far as it was run: Fine-tuned, SMoE-Dropout at k = N is better than dense training (Table 2, setting "
        "paper, scale cpu: held in 1, not run in 7 of 8 comparisons)" in text
    )
    assert text.endswith("\nNot run: SMoE-Dropout answers multi-hop questions best (Table A6)")
    assert "held: 2; held, as far as it was run: 4; " in text and text.splitlines()[0].endswith("not run: 1.")


@pytest.mark.parametrize(("share", "status"), [(0.5, "within noise"), (0.35, "not held")])
def test_claims_that_do_not_hold_or_drown(share, status, tmp_path):
    records = [
        r for r in table2(PAPER, columns=COLUMNS[:1]) if (r["method"], r["config"]["keep"]) != ("smoe_dropout", None)
    ]
    found, text = findings(tmp_path, [*records, run("smoe_dropout", share, 150, **PAPER)])
    assert found["transfer_dense"].checks[0].status.name.lower().replace("_", " ") == status
    verdict = "Not held" if status == "not held" else "Within noise"
    assert f"{verdict}, in some comparison at least: Fine-tuned, SMoE-Dropout at k = N is better than dense" in text


def test_a_comparison_of_models_that_have_learned_nothing_says_so(tmp_path):
    records = [run(method, 0.0, 150, **PAPER) for method in ("dense_dropout", "smoe", "smoe_dropout")]
    found, text = findings(tmp_path / "nothing", records)
    assert check_words(found["transfer_dense"].checks[0]) == "no difference (neither beats its floor)"
    told = "Nothing can be said yet, as all runs are at or below their floor: Fine-tuned, SMoE-Dropout at k = N is"
    assert told in text and "not run in 7 of 8 comparisons, neither beats its floor in 1)" in text
    records[2] = run("smoe_dropout", 0.9, 150, **PAPER)
    found, text = findings(tmp_path / "one", records)
    assert check_words(found["transfer_dense"].checks[0]) == "held" and "floor" not in text


def test_models_that_have_learned_nothing_do_not_decide_what_the_others_come_to(tmp_path):
    idle = [run(method, 0.0, 150, **PAPER) for method in ("dense_dropout", "smoe", "smoe_dropout")]
    for share, words in ((0.5, "Within noise"), (0.8, "Held, as far as it was run"), (0.35, "Not held")):
        csqa = {"model": "bert", "dataset": "csqa", "task": "multiple_choice", **PAPER}
        others = [run("dense_dropout", 0.5, 150, **csqa), run("smoe_dropout", share, 150, **csqa)]
        found, text = findings(tmp_path / words, [*idle, *others])
        assert found["transfer_dense"].checks[0].status.name == "NO_DIFFERENCE"
        (line,) = (
            line for line in text.splitlines() if ": Fine-tuned, SMoE-Dropout at k = N is better than dense" in line
        )
        assert (
            line.startswith(words) and "no difference in 1" in line and line.endswith("neither beats its floor in 1)")
        )
    # What is shown to be worse is said even where neither beats its floor.
    floor = {"floors": {"bag_of_words": {"test": 0.99}}}
    worse = [record | floor for record in table2(PAPER, columns=COLUMNS[:1])[:4]]
    worse += [run("smoe_dropout", 0.3, 150, **PAPER) | floor, *others[:1], run("smoe_dropout", 0.9, 150, **csqa)]
    _, text = findings(tmp_path / "worse", worse)
    assert "\nNot held, in some comparison at least: Fine-tuned, SMoE-Dropout at k = N is better than dense" in text


def test_without_predictions_and_seeds_nothing_is_said_to_hold(tmp_path):
    records = [{name: part for name, part in r.items() if name != "said"} for r in table2(PAPER, columns=COLUMNS[:1])]
    found, text = findings(tmp_path, records)
    assert found["transfer_dense"].checks[0].difference.low is None
    assert "Without an interval" in text and "Held: " not in text


def test_predictions_that_are_not_the_records_are_named(tmp_path):
    write(tmp_path, [run("smoe", 0.5, 50)])
    record = json.loads((tmp_path / "0.json").read_text())
    record["metrics"]["accuracy"]["test"]["16"] += 0.1
    (tmp_path / "0.json").write_text(json.dumps(record))
    runs, problems = collect(tmp_path)
    assert runs[0].right is None
    assert problems == ["0.json: its predictions are not those of the record, with all of its experts"]
