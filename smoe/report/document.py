"""REPORT.md: findings, Table 1 and the figures, each number with its scale and seeds."""

from __future__ import annotations

from collections.abc import Sequence

from smoe.methods import METHODS
from smoe.paper import paper_results
from smoe.report.checks import DEFAULT_MARGIN, MARGINS, Check, Finding, check_words, gaps
from smoe.report.claims import CLAIMS
from smoe.report.costs import flops_of, measured_seconds, seconds_of
from smoe.report.encoder import encoder_parts
from smoe.report.markdown import MISSING, md, mean_and_deviation, number, seeds, table
from smoe.report.panels import PRETRAINING, Line, Panel, is_empty, table1
from smoe.report.plots import Plot
from smoe.report.records import examples_of
from smoe.report.runs import Cell, Context
from smoe.report.tables import slimming_table
from smoe.report.transfer import Column
from smoe.report.transfer_claims import CLAIMS as TRANSFER_CLAIMS
from smoe.report.transfer_tables import shown_of, transfer_parts

_HEAD = """# Report

Written by `bash script/report.sh` from the records in this folder, and from nothing else; do not edit it. The same with
a slider for k: [report.html](report.html), which opens without a server.

## What these numbers can and can't say

A run at scale `cpu` takes minutes on two cores: a model of one or two million parameters. A Transformer-XL sees a few
percent of the training data and is measured on the first part of the test split; BERT and RoBERTa see a few books. Such
a run can show whether a method works at all, how its quality moves with k, and which of two methods is ahead *at this
size and length*, once several seeds agree. It can't show what the paper's models do after 400 000 steps: there is
little time to overfit, learned routers have little time to collapse, and a method that starts slowly has no time to
catch up. Scale `hour` is the same with a larger model or a longer training. Differences to the paper's numbers are
therefore those of size and length first; of BERT and RoBERTa those of text and vocabulary too (1024 tokens at scale
`cpu`, about 30 000 and 50 000 in the paper), which makes each token easier to predict. The gap to dense training with
dropout, beside them, compares better. Only scale `paper` repeats the paper's setting.

One seed says what happened once. No comparison of pretraining runs is called held, or not held, on fewer than three."""

_FINDINGS = """## The paper's findings

Each finding is a set of comparisons. With three seeds or more, a comparison is *held* if the 95 % t interval of the
difference, paired by seed, lies on the paper's side of 0; *not held* if it lies on the other side; *no difference* if
two one-sided tests (5 %) show that the difference is within the margin; else *within noise*. The margin, in the unit of
the metric, is {margins}.
Comparisons of fine-tuned runs have an interval with fewer seeds too, where predictions of each example are kept: that
of a paired bootstrap over the examples; *no difference* is then an interval within the margin. The weakest comparison
decides what becomes of a finding. Intervals are those of single comparisons; all of them are at the end. Methods are
compared at k = N by the checkpoint that was chosen there, one method over several k by a single checkpoint, so that the
same k may stand with two values."""

_TABLE1 = """## Table 1

Means over the seeds and their standard deviation. SMoE and THOR at k = N are those of the checkpoint that was chosen at
k = N; *to dense* is the mean difference to dense training with dropout over the seeds that both have. FLOPs are those
at the row's k: of a forward pass over an evaluation batch as the paper counts (linear layers), of a training step all.
Seconds are the medians of the runs' own clocks, on whatever machine they ran, beside whatever else ran there; only
*interleaved* seconds, measured by `python -m benchmarks.methods` in one process, compare speed. *Without a model*: the
bits that counting in train reaches on the same masked tokens, by how frequent a token is (`unigram`) and how often it
stands between its two neighbours (`two_sided_bigram`); `_shown`: also by what is shown in the token's place."""

_FIGURES = {
    "figure1": "Figure 1: over active parameters. Experts: one training at several k. Dense: a training per point. "
    "Bars: the standard deviation over seeds.",
    "figure3": "Figure 3: all methods over active parameters. Bars: the standard deviation over seeds.",
    "figure4": "Figure 4: after fine-tuning, over kept experts, a training per point, or over the experts that one "
    "training activates. Dense: an MLP as wide as so many experts. Points of one number of experts are drawn beside "
    "one another. All points of a panel are of the same folds. Bars: the standard "
    "deviation over seeds, of one seed the Wilson interval.",
    "figure5": "Figure 5: what makes SMoE-Dropout work. (a) and (b) at k = N. Bars: the standard deviation over seeds.",
}


def document(
    contexts: Sequence[Context],
    findings: Sequence[Finding],
    plots: Sequence[Plot],
    problems: Sequence[str],
    step_times: list[dict],
    figures: str,
    columns: Sequence[Column] = (),
    encoders: Sequence[Column] = (),
    encoder_times: Sequence[dict] = (),
) -> str:
    """REPORT.md as text.

    Args:
        problems: records that were left out, a line each. step_times: rows of ``step_times.json``.
        figures: the folder of the plots as seen from the document. columns: the fine-tuned runs.
        encoders: those of encoders that were pretrained elsewhere. encoder_times: rows of ``encoder_times.json``.
    """
    count = sum(len(context.runs) for context in contexts)
    parts = [_HEAD, f"Records: {count} runs." + (f" {len(problems)} left out:" if problems else " None was left out.")]
    if problems:
        parts.append("\n".join(f"- {md(problem, 300)}" for problem in problems))
    parts += _findings(findings)
    parts.append(_TABLE1)
    parts += [part for context in contexts if context.task in PRETRAINING for part in _table1(context, step_times)]
    parts += transfer_parts(columns, [finding for finding in findings if finding.key in TRANSFER_CLAIMS])
    for name, title in _FIGURES.items():
        parts += _figure(name, title, [plot for plot in plots if plot.figure == name], figures)
    parts += encoder_parts(encoders, plots, encoder_times, figures)
    parts += _other_runs(contexts, plots, columns, encoders)
    parts += _step_times(step_times) + _comparisons(findings)
    return "\n\n".join(parts) + "\n"


def _findings(findings: Sequence[Finding]) -> list[str]:
    margins = ", ".join(f"{value:g} for {md(name)}" for name, value in MARGINS.items())
    rows = [[md(f.statement), f.where, _where(f), f.words] for f in findings]
    text = _FINDINGS.format(margins=f"{margins}, else {DEFAULT_MARGIN:g}")
    return [text, table(["finding", "paper", "runs", "status"], rows, texts=4)]


def _comparisons(findings: Sequence[Finding]) -> list[str]:
    parts = ["## The findings, comparison by comparison"]
    head = ["better, as claimed", "than", "value", "value", "better by", "95 % interval", "seeds", "status"]
    for key, claim in (CLAIMS | TRANSFER_CLAIMS).items():
        found = [finding for finding in findings if finding.key == key and finding.checks]
        parts += [f"### {md(claim.statement)}"] if found else []
        for finding in found:
            parts.append(f"{_where(finding)}: **{finding.words}**.")
            parts.append(table(head, [_check(check) for check in finding.checks], texts=2))
    return parts


def _where(finding: Finding) -> str:
    return md("; ".join(filter(None, (finding.subject, finding.context)))) or MISSING


def _check(check: Check) -> list[str]:
    found, at = check.difference, check.at
    names = [md(check.better), md(check.worse)]
    if found is None or at is None:
        return [*names, *[MISSING] * 5, check_words(check)]
    interval = "-" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
    return [*names, *map(number, at), f"{found.mean:+.4f}", interval, seeds(found.seeds), check_words(check)]


def _table1(context: Context, step_times: list[dict]) -> list[str]:
    cells = table1(context)
    if not cells:
        return []
    paper = paper_results()["table1"].get(context.model, {})
    dense = next((cell.at("dense") for _, cell in cells if cell.first.method == "dense_dropout"), {})
    rows = [row for label, cell in cells for row in _rows(context, label, cell, paper, dense, step_times)]
    for method in METHODS.values():
        if not any(cell.first.method == method.name for _, cell in cells):
            rows.append([md(method.title), *[MISSING] * 11])
    head = ["method", "k", "paper", "ours", "difference", "to dense, paper", "to dense, ours", "seeds"]
    head += ["forward GFLOPs", "step GFLOPs", "s / step", "interleaved"]
    examples = {examples_of(run.record) for run in context.runs}
    n = ", ".join(f"n = {count:,}" for count in sorted(filter(None, examples))) or "n not recorded"
    return [f"### {md(context.label)}", f"{md(context.measure)}, {n}.{_floors(context)}", table(head, rows)]


def _floors(context: Context) -> str:
    """What the records' floors reach on the same tokens, those that all runs share."""
    split = context.metric["split"]
    floors = [run.record.get("floors") or {} for run in context.runs]
    said = [{(name, of[split]) for name, of in own.items() if split in of} for own in floors]
    shared = sorted(set.intersection(*said), key=lambda floor: (-floor[1], floor[0]))
    return f" Without a model: {', '.join(f'{md(name)} {value:.4f}' for name, value in shared)}." if shared else ""


def _rows(
    context: Context, label: str, cell: Cell, paper: dict, base: dict[int | None, float], step_times: list[dict]
) -> list[list[str]]:
    method, full = cell.first.method, cell.first.full
    as_released = label == METHODS[method].title  # the paper has no variants
    keys = {full: "" if full == "dense" else "_k_N"}
    if method == "smoe_dropout":
        keys = {str(int(full) // 2): "_k_half", **keys}
    rows = []
    for key, suffix in keys.items():
        printed = paper.get(method + suffix, {}).get("bpc") if as_released else None
        values = list(cell.at(key).values())
        mean = sum(values) / len(values) if values else None
        dense = paper.get("dense_dropout", {}).get("bpc")
        flops = [flops_of(cell, key, kind) for kind in ("paper", "training_step")]
        times = [seconds_of(cell), measured_seconds(step_times, context.model, context.scale, method)]
        beside = [number(printed), _minus(mean, printed), _minus(printed, dense)] if as_released else ["-"] * 3
        rows.append(
            [md(label), "-" if key == "dense" else key, beside[0], mean_and_deviation(values), *beside[1:]]
            + [_to_dense(cell.at(key), base), seeds(cell.seeds)]
            + [number(None if count is None else count / 1e9, 2) for count in flops]
            + [number(time, 3) for time in times]
        )
    return rows


def _minus(a: float | None, b: float | None) -> str:
    return MISSING if a is None or b is None else f"{a - b:+.4f}"


def _to_dense(values: dict[int | None, float], base: dict[int | None, float]) -> str:
    """The mean difference over the seeds that both have, which are named where they are not all of the row's."""
    by_seed = gaps(values, base)
    if not by_seed:
        return MISSING
    some = "" if by_seed.keys() == values.keys() else f" (seeds {', '.join(map(str, sorted(by_seed, key=str)))})"
    return f"{sum(by_seed.values()) / len(by_seed):+.4f}{some}"


def _figure(name: str, title: str, plots: Sequence[Plot], figures: str) -> list[str]:
    heading, _, text = title.partition(": ")
    parts = [f"## {heading}", text[0].upper() + text[1:]]
    if not plots:
        return [*parts, "Not run."]
    for plot in plots:
        parts.append(f"![{heading}, scale {md(plot.scale)}]({figures}/{plot.stem}.png)")
        titles = [title for row in plot.titles() for title in row]
        for panel, title in zip((panel for row in plot.rows for panel in row), titles, strict=True):
            where = f", {md(panel.context.label)}" if name == "figure5" else ""
            parts.append(f"### {title if where else md(title)}{where}")
            parts.append("Not run." if is_empty(panel) else _panel(panel))
    return parts


def _panel(panel: Panel) -> str:
    """The numbers of a plot: a row per line, a column per k or size."""
    places: dict[str, float] = {}
    rows = []
    for line in panel.lines:
        rows.append({_column(panel, point.key, point.x): mean_and_deviation(point.values) for point in line.points})
        places |= {_column(panel, point.key, point.x): point.x for point in line.points}
    columns = sorted(places, key=lambda column: (places[column], column))
    return table(
        [md(panel.context.measure), "seeds", *columns],
        [
            [md(line.label), _line_seeds(line), *(row.get(column, "-") for column in columns)]
            for line, row in zip(panel.lines, rows, strict=True)
        ],
    )


def _line_seeds(line: Line) -> str:
    """``1, 2, 3 (n = 1 or 3)`` where some points have fewer than others."""
    of_points = [point.cell.seeds for point in line.points]
    counts = sorted({len(of_point) for of_point in of_points})
    if len(counts) == 1:
        return seeds(of_points[0])
    every = sorted({seed for of_point in of_points for seed in of_point})
    return f"{', '.join(map(str, every))} (n = {' or '.join(map(str, counts))})"


def _column(panel: Panel, key: str, x: float) -> str:
    if not panel.parameters:
        return f"{x:g}"
    return f"{x:.2f} M" if key == "dense" else f"k = {key}"


def _other_runs(
    contexts: Sequence[Context], plots: Sequence[Plot], columns: Sequence[Column], encoders: Sequence[Column]
) -> list[str]:
    """The runs that no table or figure above shows."""
    panels = [panel for plot in plots for row in plot.rows for panel in row if not is_empty(panel)]
    shown = [point.cell for panel in panels for line in panel.lines for point in line.points]
    shown += [cell for context in contexts if context.task in PRETRAINING for _, cell in table1(context)]
    known = {id(run) for cell in shown for run in cell.runs}
    tuned = [one for column in columns for one in shown_of(column)]
    tuned += [one for column in encoders for one in column.tuned.values()]
    known |= {id(run) for one in tuned for run in one.all_runs()}
    others = [run.record for context in contexts for run in context.runs if id(run) not in known]
    return ["## Other runs", f"```\n{slimming_table(others)}\n```"] if others else []


def _step_times(rows: list[dict]) -> list[str]:
    head = "## Seconds per training step, measured interleaved"
    if not rows:
        return [head, "Not measured; `python -m benchmarks.methods --json results/step_times.json` does."]
    cells = [
        [md(row["method"]), md(row["model"]), md(row["scale"]), md("-" if row.get("k") is None else row["k"])]
        + [number(row["seconds_per_step"]), number(row["flops_per_step"] / 1e9, 2)]
        for row in rows
    ]
    known = [[row.get(name, "unknown") for name in ("processor", "threads", "precision")] for row in rows]
    where = "; ".join(dict.fromkeys(f"{md(on)}, threads: {md(threads)}, {md(how)}" for on, threads, how in known))
    return [head, f"On {where}.", table(["method", "model", "scale", "k", "median seconds", "GFLOPs"], cells)]
