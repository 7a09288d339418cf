"""REPORT.md, report.html and the plots, from a folder of records."""

from __future__ import annotations

import copy
import json
import re

import pytest
from made_up import every_panel, made_up, write
from markdown_it import MarkdownIt

from smoe.methods import METHODS
from smoe.report import main, slimming_table, write_report
from smoe.report.collect import collect
from smoe.report.panels import FIGURE5, figure1, figure3, table1
from smoe.report.runs import contexts_of, read_run


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "Figs").mkdir()
    return tmp_path / "results", tmp_path / "Figs"


def context(records: list[dict]):
    (only,) = contexts_of(read_run(record, "record") for record in records)
    return only


def rows_of(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    after = markdown.split(f"{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\|\n)+", after, flags=re.M)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


# ---- which runs a panel shows


def test_panels_take_runs_by_what_their_records_say():
    here = context(every_panel(seeds=(1, 2)))
    assert here.standard == (4, 1024, 16)
    assert [label for label, _ in table1(here)] == [method.title for method in METHODS.values()]
    places = {
        name: {line.label: [point.x for point in line.points] for line in make(here).lines}
        for name, make in FIGURE5.items()
    }
    methods = ["Dense w. Dropout", "SMoE", "SMoE-Dropout"]
    assert places["figure5a"] == dict.fromkeys(methods, [2, 4, 8, 12])
    assert places["figure5b"] == dict.fromkeys(methods, [2, 4, 8, 16])
    assert list(places["figure5c"]) == ["fixed random router", "token-id hash", "uniform random routing"]
    assert list(places["figure5d"]) == ["growing, k = 8..16", "k = 16 throughout"]
    assert list(places["figure5e"]) == ["all", "early", "middle", "later", "every-2"]
    assert places["beyond"] == {}
    assert all(len(xs) == 6 for name in ("figure5c", "figure5d", "figure5e") for xs in places[name].values())
    assert {line.label: len(line.points) for line in figure1(here).lines} == dict(zip(methods, (5, 6, 6), strict=True))
    assert len(figure3(here).lines) == 6


def test_schedules_with_a_learned_router_have_a_panel_beyond_the_paper():
    runs = [made_up("smoe"), made_up("smoe", schedule="random_per_layer", k_min=1, k_max=16)]
    runs += [made_up("smoe", schedule="linear", k_min=8, k_max=16), made_up("dense_dropout")]
    here = context(runs)
    names = ["k = 2 throughout", "random per layer, k = 1..16", "growing, k = 8..16"]
    assert [line.label for line in FIGURE5["beyond"](here).lines] == names
    assert [label for label, _ in table1(here)] == ["Dense w. Dropout", "SMoE"]


def test_points_are_read_at_n_and_hold_every_seed():
    records = every_panel(seeds=(1, 2))
    (line,) = (line for line in FIGURE5["figure5b"](context(records)).lines if line.style == "smoe_dropout")
    found = {point.x: sorted(point.values) for point in line.points}
    for n in (2, 4, 8, 16):
        runs = [made_up("smoe_dropout", seed, num_experts=n, d_hidden=64 * n) for seed in (1, 2)]
        assert found[n] == sorted(run["metrics"]["bpc"]["test"][str(n)] for run in runs)


# ---- finding records


def test_records_are_found_anywhere_and_other_json_is_passed_over(folders):
    results, _ = folders
    record = made_up("smoe")
    write(results / "table1/cpu", [record])
    write(results / "figure5a/cpu/deep", [record, made_up("smoe", 2)])  # the first is there twice
    (results / "bench.json").write_text('{"what": "a benchmark", "records": [{"method": "smoe"}]}')
    (results / "list.json").write_text("[1, 2]")
    (results / "notes.txt").write_text("{")
    runs, problems = collect(results)
    assert [run.seed for run in runs] == [1, 2] and problems == []


DAMAGED = [  # what is changed in a record, and words of the warning
    ({"metrics": None}, "metrics is None"),
    ({"method": "mixture"}, "method is 'mixture'; it must be one of dense_dropout"),
    ({"config": {"num_layers": "four"}}, "config.num_layers is 'four'; it must be a whole number"),
    ({"config": {"num_layers": 4, "d_hidden": 1000, "num_experts": 16}}, "d_hidden is 1000; it must be a multiple"),
    ({"config": {"num_layers": 4, "d_hidden": 64, "num_experts": 16, "layers": "odd"}}, "config.layers is 'odd'"),
    ({"config": {"num_layers": 4, "d_hidden": 64, "num_experts": 16, "layers": 7}}, "config.layers is 7"),
    ({"config": {"num_layers": 4, "d_hidden": 64, "num_experts": 16, "router": 7}}, "config.router is 7"),
    ({"config": None}, "config.num_layers is None"),
    ({"task": ["x"]}, "task is ['x']; it must be text"),
    ({"flops": {"16": {"paper": "many"}}}, "flops.16.paper is 'many'; it must be a number"),
    ({"flops": {"1\n6": 3}}, "flops.1 6 is 3; it must be numbers by name"),
    ({"seconds": 3}, "seconds is 3; it must be numbers by name"),
    ({"floors": {"unigram": {"test": float("inf")}}}, "floors.unigram is {'test': inf}; it must be a number of at"),
    ({"best_at_other_k": [{"k": 16, "metrics": {}}]}, "best_at_other_k.0.metrics.bpc.test is None"),
    ({"best_at_other_k": {"k": 16}}, "best_at_other_k is {'k': 16}; it must be a list"),
    ({"method": "dense_dropout"}, "dense_dropout was measured at 1, 2, 4, 8, 12, 16; it must have one number"),
]


def test_a_damaged_record_is_named_and_left_out(folders, capsys):
    results, figures = folders
    write(results / "good", [made_up("dense_dropout"), made_up("smoe_dropout")])
    (results / "bad").mkdir()
    for i, (change, _) in enumerate(DAMAGED):
        (results / f"bad/{i:02}.json").write_text(json.dumps(made_up("smoe_dropout", 2) | change))
    main(["--all", "--results", str(results), "--figures", str(figures)])
    out, err = capsys.readouterr()
    warnings = err.splitlines()
    assert len(warnings) == len(DAMAGED)
    for i, (warning, (_, words)) in enumerate(zip(warnings, DAMAGED, strict=True)):
        assert warning.startswith(f"warning: left out: bad/{i:02}.json: ") and words in warning
    assert f"Records: 2 runs. {len(DAMAGED)} left out:" in (results / "REPORT.md").read_text()
    assert str(results / "REPORT.md") in out


def test_a_record_cut_off_is_named_too(folders):
    results, _ = folders
    (results / "a.json").write_text('{"method": "smoe", ')
    runs, problems = collect(results)
    assert runs == [] and problems[0].startswith("a.json: is not JSON: ")


def test_of_two_records_of_one_seed_the_newer_counts_and_the_other_is_named(folders):
    results, _ = folders
    old, new = made_up("smoe"), copy.deepcopy(made_up("smoe"))
    new["environment"]["date"] = "2026-12-01T00:00:00+00:00"
    new["metrics"]["bpc"]["test"]["16"] = 1.0
    write(results, [new, old])
    runs, problems = collect(results)
    assert [run.record for run in runs] == [new]
    assert problems == ["smoe-1-seed1.json: the same run and seed as smoe-0-seed1.json, which is newer"]


# ---- the document


def test_table1_has_the_papers_numbers_ours_and_the_difference(folders):
    results, figures = folders
    records = [made_up(method, seed) for seed in (1, 2) for method in METHODS if method != "thor"]
    write(results / "table1", records)
    write_report(results, figures)
    rows = rows_of((results / "REPORT.md").read_text(), r"### transformer\_xl on enwik8, scale cpu")
    head, _, *body = rows
    cells = {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in body}
    dense, half, full = (
        cells[key] for key in (("Dense w. Dropout", "-"), ("SMoE-Dropout", "8"), ("SMoE-Dropout", "16"))
    )
    values = [r["metrics"]["bpc"]["test"]["8"] for r in records if r["method"] == "smoe_dropout"]
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    assert half["ours"] == f"{mean:.4f} ± {deviation:.4f}" and half["paper"] == "1.1776"
    assert half["difference"] == f"{mean - 1.1776:+.4f}" and half["seeds"] == "1, 2 (n = 2)"
    base = sum(r["metrics"]["bpc"]["test"]["dense"] for r in records if r["method"] == "dense_dropout") / 2
    assert half["to dense, ours"] == f"{mean - base:+.4f}" and half["to dense, paper"] == f"{1.1776 - 1.1623:+.4f}"
    assert full["paper"] == "1.1486" and dense["to dense, ours"] == "+0.0000"
    record = next(r for r in records if r["method"] == "smoe_dropout")
    assert half["forward GFLOPs"] == f"{record['flops']['8']['paper'] / 1e9:.2f}" and half["s / step"] == "0.100"
    # What was not run is there as missing.
    (missing,) = (row for row in body if row[0] == "THOR")
    assert missing[1:] == ["missing"] * 11
    assert half["interleaved"] == "missing"


def test_differences_to_dense_are_of_the_seeds_that_both_have(folders):
    results, figures = folders
    records = [made_up("dense_dropout", seed) for seed in (1, 2, 3)] + [made_up("smoe", seed) for seed in (2, 7)]
    narrow = made_up("dense_dropout", 1, d_hidden=64)
    for record, value in zip(records, (2.0, 2.2, 2.4, 2.3, 9.0), strict=True):
        test = record["metrics"]["bpc"]["test"]
        test |= dict.fromkeys(test, value)
    write(results / "table1", [*records, narrow])
    write_report(results, figures)
    report = (results / "REPORT.md").read_text()
    body = rows_of(report, r"### transformer\_xl on enwik8, scale cpu")[2:]
    (smoe,) = (row for row in body if row[0] == "SMoE")
    assert smoe[6:8] == ["+0.1000 (seeds 2)", "2, 7 (n = 2)"]
    # The line of a figure may have more seeds at one place than at another.
    figure = rows_of(report.split("## Figure 3")[1], r"### transformer\_xl on enwik8, scale cpu")
    assert [row[:2] for row in figure[2:4]] == [["Dense w. Dropout", "1, 2, 3 (n = 1 or 3)"], ["SMoE", "2, 7 (n = 2)"]]


def test_table1_has_the_floors_that_all_runs_share(folders):
    results, figures = folders
    records = [made_up(method, model="bert") for method in ("dense_dropout", "smoe_dropout")]
    for record, bigram in zip(records, (5.5, 5.6), strict=True):
        record["floors"]["two_sided_bigram"] = {"test": bigram}
        record["floors"]["of_valid"] = {"valid": 5.0}
    write(results / "table1", records)
    assert write_report(results, figures)[1] == []
    report = (results / "REPORT.md").read_text()
    assert "(lower is better), n = 131,072. Without a model: unigram 8.7000.\n" in report


def test_step_times_stand_beside(folders):
    results, figures = folders
    write(results / "table1", [made_up("dense_dropout"), made_up("smoe_dropout")])
    row = {"model": "transformer_xl", "scale": "cpu", "method": "smoe_dropout", "flops_per_step": 2e9}
    rows = [row | {"k": 8, "as_trained": False, "seconds_per_step": 0.5}]
    rows += [row | {"k": "8..16", "as_trained": True, "seconds_per_step": 0.625, "precision": "bf16"}]
    file = results / "step_times.json"
    file.write_text(json.dumps({"what": "steps", "processor": "A *fast* one", "threads": 2, "records": rows}))
    _, problems = write_report(results, figures)
    report = (results / "REPORT.md").read_text()
    assert problems == []
    assert all(row[-1] == "0.625" for row in rows_of(report, "### transformer\\_xl on enwik8, scale cpu")[3:5])
    times = rows_of(report, "## Seconds per training step, measured interleaved")
    assert times[-1] == ["smoe\\_dropout", "transformer\\_xl", "cpu", "8..16", "0.6250", "2.00"]
    assert "\nOn A \\*fast\\* one, threads: 2, unknown; A \\*fast\\* one, threads: 2, bf16.\n" in report
    for broken in ("{", '{"records": 3}', '{"rows": []}', json.dumps({"records": [row | {"seconds_per_step": "x"}]})):
        file.write_text(broken)
        _, problems = write_report(results, figures)
        assert len(problems) == 1 and problems[0].startswith("step_times.json: "), broken


def test_every_panel_is_drawn_and_what_was_not_run_is_said(folders):
    results, figures = folders
    write(results / "everything", every_panel(seeds=(1, 2)))
    written, _ = write_report(results, figures)
    names = {path.name for path in written}
    stems = [f"figure{n}_cpu" for n in (1, 3, 5)]
    assert names == {"REPORT.md", "report.html", *(f"{stem}.{end}" for stem in stems for end in ("png", "svg"))}
    report = (results / "REPORT.md").read_text()
    for stem in stems:
        assert f"](../Figs/{stem}.png)" in report
    assert "of one seed the Wilson interval.\n\nNot run." in report
    assert "## Other runs" not in report
    again, _ = write_report(results, figures)
    contents = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in again} == contents  # nothing but the records decides


def test_runs_that_no_panel_shows_are_listed(folders):
    results, figures = folders
    write(results, [made_up("smoe_dropout"), made_up("dense_dropout"), made_up("smoe", schedule="random", k_max=16)])
    write_report(results, figures)
    report = (results / "REPORT.md").read_text()
    others = report.split("## Other runs")[1].split("##")[0]
    assert "SMoE" in others and "Dense" not in others and "SMoE-Dropout" not in others


def test_text_in_a_record_injects_neither_html_nor_markdown(folders):
    results, figures = folders
    evil = "x</script><script>alert(1)</script> [a](http://b) ![c](d) **e** `f` | g | <img src=x> &lt; "
    evil += "$h$ https://i.j www.k.l"
    records = []
    for method in ("dense_dropout", "smoe_dropout"):
        record = made_up(method, steps=evil, output_scale=evil)
        record |= {"scale": evil, "dataset": {"name": evil}, "model": evil, "label": evil}
        record["metrics"]["bpc"] |= {"title": evil, "unit": evil}
        records.append(record)
    write(results / "evil", [*records, made_up("smoe")])
    (results / f"{evil.replace('/', '')[:80]}.json").write_text("{")
    write_report(results, figures)
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse((results / "REPORT.md").read_text())
    inside = [child for token in tokens for child in token.children or []]
    links = {child.attrs.get("href") for child in inside if child.type == "link_open"}
    images = {child.attrs.get("src") for child in inside if child.type == "image"}
    assert links == {"report.html", "../docs/pretrained.md"}
    assert all(re.fullmatch(r"\.\./Figs/figure[135]_\w+\.png", source) for source in images)
    assert not [token for token in [*tokens, *inside] if token.type.startswith("html")]
    marked = [after.content for token, after in zip(inside, inside[1:], strict=False) if token.type == "strong_open"]
    assert marked and "e" not in marked
    assert "f" not in [child.content for child in inside if child.type == "code_inline"]
    assert not re.search(r"(?<!\\)[$]|https?://|www\.", (results / "REPORT.md").read_text())
    page = (results / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 3 and "alert(1)" in page


def test_a_dense_model_does_not_say_what_only_experts_have():
    records = [made_up("dense_dropout"), made_up("smoe_dropout", output_scale="num_experts", router="hash")]
    names = [line.split("  ")[0] for line in slimming_table(records).splitlines()[4:]]
    assert names == ["Dense w. Dropout", "SMoE-Dropout, output_scale num_experts, router hash"]


# ---- the page


def test_page_holds_every_number_of_table1(folders):
    results, figures = folders
    records = [made_up(method, seed) for seed in (1, 2) for method in METHODS]
    write(results, records)
    write_report(results, figures)
    page = (results / "report.html").read_text()
    assert 5e5 < len(page) < 2e6  # Vega is inside
    (data,) = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
    assert data["ks"] == [1, 2, 4, 8, 12, 16] and len(data["methods"]) == 6
    (smoe,) = (method for method in data["methods"] if method["method"] == "smoe")
    of_smoe = [record for record in records if record["method"] == "smoe"]
    point = smoe["points"]["4"]
    assert point["value"] == pytest.approx(sum(r["metrics"]["bpc"]["test"]["4"] for r in of_smoe) / 2)
    assert point["parameters"] == of_smoe[0]["parameters"]["active_per_k"]["4"] / 1e6
    assert point["flops"] == of_smoe[0]["flops"]["4"]["paper"] / 1e9 and smoe["seconds"] == 0.1
    assert not re.search(
        r'(?:src|href)="(?!data:)', page.replace(re.search(r"<script>(.*?)</script>", page, re.S)[1], "")
    )


# ---- the command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--all", "RUN"], "RUN has no effect with --all"),
        (["--all", "--plot", "a.png"], "--plot has no effect with --all"),
        (["RUN", "--results", "a"], "--results has no effect without --all"),
        (["--all", "--results", "nowhere"], "results: nowhere does not exist"),
        (["--all", "--results", "EMPTY", "--figures", "nowhere"], "figures: nowhere does not exist"),
        (["--all", "--results", "EMPTY", "--figures", "EMPTY"], "has no record of a run that can be reported"),
    ],
)
def test_bad_input(tmp_path, arguments, words):
    places = {"EMPTY": str(tmp_path)}
    with pytest.raises(ValueError, match=words):
        main([places.get(argument, argument) for argument in arguments])
    assert list(tmp_path.iterdir()) == []
