"""Tables 2, 3, A4, A5 and A6 as Markdown for REPORT.md, and Table 2 as text for README.md."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from smoe.paper import paper_results
from smoe.report.checks import Finding
from smoe.report.markdown import MISSING, md, number, p_value, table, text_table
from smoe.report.statistics import mean_interval, paired_difference
from smoe.report.transfer import DISTILLATION, QUESTIONS, ROWS, SETTINGS, Column, Score, Tuned, complete, mcnemar_p
from smoe.report.transfer import difference as difference_of
from smoe.report.transfer_claims import by_seed, kept_of, row_label, summary

_TRANSFER = """## Transfer

Fine-tuned runs, in percent of n test examples (of SST-2 its dev sentences). *95 %* is the Wilson interval of a share;
*to dense* the paired difference on the same examples with the interval of a paired bootstrap, widened to the t interval
over the seeds where there are three; *p* McNemar's exact test against dense. Where a row has several seeds, *ours*, its
interval and *p* are those of the lowest one; *over seeds* has the mean and standard deviation of all. Folds are pooled,
each example counting as much. *Beats its floor*: whether the interval lies above the best of the floors that the record
holds. SST-2's test labels are not public: its checkpoints are chosen on the same dev sentences that the table shows,
for every method, so its numbers are a little too high."""

_HEAD = ["task", "method", "paper", "ours", "95 %", "difference", "n", "to dense", "95 %", "p", "floor"]
_HEAD += ["beats its floor", "over seeds"]


def transfer_parts(columns: Sequence[Column], findings: Sequence[Finding]) -> list[str]:
    """The section of REPORT.md about transfer. Every cell without a run says that it is missing."""
    counted, lines = summary(findings)
    parts = [_TRANSFER, md(counted, 10_000), "\n".join(f"- {md(line, 10_000)}" for line in lines)]
    for name, make in (("2", _table2), ("3", _table3), ("A4", _table_a4), ("A5", _table_a5), ("A6", _table_a6)):
        parts.append(f"## Table {name}")
        parts += make(columns) or ["Not run."]
    return parts


def table2_text(columns: Sequence[Column], findings: Sequence[Finding]) -> str:
    """Table 2 as text, a block per scale and setting that was run, and what becomes of the paper's claims."""
    blocks = []
    for (scale, setting), found in _groups(columns, lambda c: c.task not in (DISTILLATION, QUESTIONS)).items():
        rows = [["", "n", *map(row_label, ROWS)]]
        for (model, dataset), column in _in_papers_order(found).items():
            printed = paper_results()["table2"].get(model, {}).get(dataset, {})
            found_of = [column and column.of(row) for row in ROWS]
            counts = sorted({_first(tuned).n for tuned in found_of if tuned})
            cells = [_text_cell(printed.get(row), tuned) for row, tuned in zip(ROWS, found_of, strict=True)]
            rows.append([f"{model}, {dataset}", " or ".join(map(str, counts)) or "-", *cells])
        heading = f"Scale {scale}, {SETTINGS[setting].replace('`', '')}"
        several = any(len(t.runs) > 1 for column in found for row in ROWS if (t := column.of(row)))
        head = f"{heading}: paper / ours [95 %]{', or mean ± deviation over seeds' if several else ''}, %"
        blocks.append("\n".join([head, "", *text_table(rows)]))
    counted, lines = summary(findings)
    said = [_wrapped(counted), "", *(_wrapped(f"- {line}", indent="  ") for line in lines)]
    return "\n\n".join([*blocks, "\n".join(said)])


def shown_of(column: Column) -> list[Tuned]:
    """The runs of a column that some table here shows."""
    if column.task == DISTILLATION:
        return list(column.students().values())
    found = [tuned for row in ROWS for tuned in column.of_row(row)]
    if column.dataset == "sst2":
        found += [
            t
            for growing in (False, True)
            for m in ("smoe", "smoe_dropout")
            for t in kept_of(column, m, growing=growing).values()
        ]
    return found


def _table2(columns: Sequence[Column]) -> list[str]:
    parts = []
    for (scale, setting), found in _groups(columns, lambda c: c.task not in (DISTILLATION, QUESTIONS)).items():
        rows = []
        for (model, dataset), column in _in_papers_order(found).items():
            printed = paper_results()["table2"].get(model, {}).get(dataset, {})
            for row in ROWS:
                tuned = column.of_row(row) if column else []
                rows += [_row(column, t, printed.get(row) if t.kind.as_released else None) for t in tuned if column]
                if not tuned:
                    name = md(f"{model}, {dataset}")
                    rows.append([name, row_label(row), number(printed.get(row), 2), *[MISSING] * (len(_HEAD) - 3)])
        parts += [f"### Scale {md(scale)}, {SETTINGS[setting]}", table(_HEAD, rows, texts=2)]
    return parts


def _row(column: Column, tuned: Tuned, printed: float | None) -> list[str]:
    score = _first(tuned)
    return [md(column.name), md(column.label(tuned.kind)), "-" if printed is None else f"{printed:.2f}",
            f"{100 * score.share:.2f}", span(*score.interval), _minus(score.share, printed), examples(tuned),
            *to_dense(column, tuned), *_floor(score), over_seeds(tuned.values())]  # fmt: skip


def examples(tuned: Tuned) -> str:
    """How many there are, and which part of the folds that is where some are missing."""
    missing = complete(tuned, tuned.seeds[0])
    return f"{_first(tuned).n:,}" + (f" ({missing})" if missing else "")


def to_dense(column: Column, tuned: Tuned) -> list[str]:
    """By how much it is better than dense training, the interval of that, and p of McNemar's test."""
    dense = column.of("dense_dropout")
    if dense is tuned:
        return ["-", "-", "-"]
    found = None if dense is None else difference_of(tuned, dense, column.margin)
    if dense is None or found is None:
        return [MISSING, MISSING, MISSING]
    interval = MISSING if found.low is None or found.high is None else span(found.low, found.high, "+.2f")
    return [f"{100 * found.mean:+.2f}", interval, p_value(mcnemar_p(tuned, dense))]


def _floor(score: Score) -> list[str]:
    """The best floor, and whether the share beats it."""
    if not score.floors:
        return [MISSING, MISSING]
    name = max(score.floors, key=lambda floor: (score.floors[floor], floor))
    best = score.floors[name]
    beaten = "yes" if score.interval[0] > best else "within noise" if score.share > best else "**no**"
    return [md(f"{100 * best:.2f} ({name.replace('_', ' ')})"), beaten]


def over_seeds(shares: Sequence[float]) -> str:
    """Mean and standard deviation of several seeds, in percent."""
    values = [100 * share for share in shares]
    return f"{fmean(values):.2f} ± {stdev(values):.2f} (n = {len(values)})" if len(values) > 1 else "one seed"


def _table3(columns: Sequence[Column]) -> list[str]:
    printed = paper_results()["table3"]["sst2"]
    head = ["teacher", "paper", "ours", "95 %", "difference", "n", "to dense", "95 %", "p", "over seeds"]
    parts = []
    for column in (column for column in columns if column.task == DISTILLATION):
        students = column.students()
        rows = []
        for teacher in dict.fromkeys([*printed, *sorted(students)]):
            method, _, variant = teacher.partition(", ")
            label = md(", ".join(filter(None, (row_label(method), variant))))
            tuned, dense = students.get(teacher), students.get("dense_dropout")
            paper = printed.get(teacher)
            if tuned is None:
                rows.append([label, number(paper, 2), *[MISSING] * (len(head) - 2)])
                continue
            score = _first(tuned)
            found = dense and dense is not tuned and difference_of(tuned, dense, column.margin)
            interval = span(found.low, found.high, "+.2f") if found and found.low is not None else "-"
            rows.append([label, "-" if paper is None else f"{paper:.2f}", f"{100 * score.share:.2f}",
                         span(*score.interval), _minus(score.share, paper), f"{score.n:,}",
                         f"{100 * found.mean:+.2f}" if found else "-", interval,
                         p_value(mcnemar_p(tuned, dense)) if found else "-", over_seeds(tuned.values())])  # fmt: skip
        parts += [_heading(column), table(head, rows)]
    return parts


def _table_a4(columns: Sequence[Column]) -> list[str]:
    """Where some row has several seeds."""
    printed = paper_results()["tableA4"]["sst2"]
    head = ["method", "paper", "mean", "standard deviation", "95 % (t)", "seeds", "to dense", "95 % (t)"]
    parts = []
    for column in columns:
        several = any(len(tuned.runs) > 1 for tuned in column.tuned.values())
        if column.dataset != "sst2" or column.task == DISTILLATION or not several:
            continue
        rows = []
        for row in ROWS:
            paper = "{:.2f} ± {:.2f}".format(*printed[row]) if column.model == "transformer_xl" else "-"
            for tuned in column.of_row(row):
                values = tuned.values()
                interval = mean_interval(values)
                paper = paper if tuned.kind.as_released else "-"
                found = paired_difference(by_seed(tuned), by_seed(column.of("dense_dropout")), column.margin)
                own = row == "dense_dropout" or found is None
                rows.append([md(column.label(tuned.kind)), paper, f"{100 * fmean(values):.2f}",
                             f"{100 * stdev(values):.2f}" if len(values) > 1 else "-",
                             span(*interval) if interval else "-",
                             f"{', '.join(map(str, tuned.seeds))} (n = {len(tuned.seeds)})",
                             "-" if own else f"{100 * found.mean:+.2f}",
                             "-" if own or found.low is None else span(found.low, found.high, "+.2f")])  # fmt: skip
            if not column.of_row(row):
                rows.append([row_label(row), paper, *[MISSING] * (len(head) - 2)])
        parts += [_heading(column), table(head, rows)]
    return parts


def _table_a5(columns: Sequence[Column]) -> list[str]:
    """Fine-tuned with so many experts; where some row has more than two budgets."""
    printed = paper_results()["tableA5"]
    lines = {"smoe_fixed_k": ("SMoE, k = 2 in pretraining", "smoe", False),
             "smoe_growing_k": ("SMoE, growing k in pretraining", "smoe", True),
             "smoe_dropout": ("SMoE-Dropout", "smoe_dropout", False)}  # fmt: skip
    parts = []
    for column in columns:
        found = {name: kept_of(column, method, growing=growing) for name, (_, method, growing) in lines.items()}
        if column.dataset != "sst2" or not (found["smoe_growing_k"] or max(map(len, found.values())) > 2):
            continue
        ks = sorted({*printed["k"], *(k for of_line in found.values() for k in of_line)})
        rows = []
        for name, (label, *_) in lines.items():
            paper = dict(zip(printed["k"], printed[name], strict=True)) if column.model == "transformer_xl" else {}
            rows.append([f"{label}, paper", *(f"{paper[k]:.2f}" if k in paper else "-" for k in ks)])
            rows.append([f"{label}, ours", *(_kept_cell(found[name].get(k)) for k in ks)])
        parts += [_heading(column), table(["kept and activated experts", *map(str, ks)], rows)]
    return parts


def _kept_cell(tuned: Tuned | None) -> str:
    if tuned is None:
        return MISSING
    if len(tuned.runs) > 1:
        return over_seeds(tuned.values())
    score = _first(tuned)
    return f"{100 * score.share:.2f} ({span(*score.interval)})"


def _table_a6(columns: Sequence[Column]) -> list[str]:
    """Exact match with n and interval, every other metric that the records hold, such as F1, and the two gaps."""
    printed = paper_results()["tableA6"]
    parts = []
    for column in (column for column in columns if column.task == QUESTIONS):
        records = [run.record for t in column.tuned.values() for of_seed in t.runs.values() for run in of_seed.values()]
        others = list(
            dict.fromkeys(key for record in records for key in record["metrics"] if key != column.metric["key"])
        )
        head = ["method", "exact match, paper", "gap, paper", "exact match, ours", "95 %", "n", "p to dense"]
        head += [md(_title(records, key)) for key in others] + [*_GAPS.values(), "over seeds"]
        rows = []
        for row in ROWS:
            name = row.partition("_k_")[0]
            whole = not row.endswith("half")
            paper = [number(printed[key].get(name) if whole else None, 2) for key in printed]
            paper = [cell if whole and name in printed["exact_match"] else "-" for cell in paper]
            for tuned in column.of_row(row):
                score, dense = _first(tuned), column.of("dense_dropout")
                p = p_value(mcnemar_p(tuned, dense)) if dense and dense is not tuned else "-"
                values = [number(None if (v := tuned.other(key)) is None else 100 * v, 2) for key in others]
                ours = [f"{100 * score.share:.2f}", span(*score.interval), f"{score.n:,}"]
                shown = [*paper, *ours, p, *values, *(_gap(tuned, form) for form in _GAPS)]
                rows.append([md(column.label(tuned.kind)), *shown, over_seeds(tuned.values())])
            if not column.of_row(row) and name in printed["exact_match"] and whole:
                rows.append([row_label(row), *paper, *[MISSING] * (len(head) - 3)])
        parts += [_heading(column), table(head, rows)]
    return parts


# The compositionality gap as the paper has it, and as Press et al. 2022 define it: docs of bert.question_answering.
_GAPS = {"exact_match_difference": "gap, ours (questions)", "gap": "gap of Press et al. (n)"}


def _gap(tuned: Tuned, form: str) -> str:
    """One form of the gap of the first seed's run, in percent, with how many questions it is of."""
    run = tuned.all_runs()[0]
    found: Any = run.record.get("compositionality")
    for name in (run.full, form):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, (int, float)):
        return MISSING
    n = run.record["compositionality"][run.full].get("n")
    of = n.get("both_single_hop_right" if form == "gap" else "multi_hop") if isinstance(n, Mapping) else None
    return f"{100 * found:.2f} ({of if isinstance(of, int) else MISSING})"


def _title(records: Sequence[dict], key: str) -> str:
    return next(
        (str(m["title"]) for r in records if isinstance(m := r["metrics"].get(key), dict) and "title" in m), key
    )


def _groups(columns: Sequence[Column], fits: Callable[[Column], bool]) -> dict[tuple[str, str], list[Column]]:
    groups: dict[tuple[str, str], list[Column]] = {}
    for column in filter(fits, columns):
        groups.setdefault((column.scale, column.setting), []).append(column)
    return groups


def _in_papers_order(columns: Sequence[Column]) -> dict[tuple[str, str], Column | None]:
    """The paper's columns, None where missing, then others; of settings that the paper has not, what is there."""
    paper = [(model, task) for model, tasks in paper_results()["table2"].items() for task in tasks]
    there = {(column.model, column.dataset): column for column in columns}
    wanted = paper if columns[0].setting in ("paper", "all") else []
    return {place: there.get(place) for place in dict.fromkeys([*wanted, *there])}


def _heading(column: Column) -> str:
    return f"### {md(column.name)}, scale {md(column.scale)}, {SETTINGS[column.setting]}"


def _first(tuned: Tuned) -> Score:
    return tuned.score(tuned.seeds[0])


def span(low: float, high: float, form: str = ".2f") -> str:
    """An interval in percent."""
    return f"{100 * low:{form}} to {100 * high:{form}}"


def _minus(share: float, printed: float | None) -> str:
    return "-" if printed is None else f"{100 * share - printed:+.2f}"


def _text_cell(printed: float | None, tuned: Tuned | None) -> str:
    if tuned is None:
        ours = MISSING
    elif len(values := [100 * share for share in tuned.values()]) > 1:
        ours = f"{fmean(values):.1f} ± {stdev(values):.1f}"
    else:
        score = _first(tuned)
        ours = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in (score.share, *score.interval)))
    missing = complete(tuned, tuned.seeds[0]) if tuned else ""
    return f"{'-' if printed is None else f'{printed:.2f}'} / {ours}" + (f" ({missing})" if missing else "")


def _wrapped(text: str, width: int = 120, indent: str = "") -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False, subsequent_indent=indent))
