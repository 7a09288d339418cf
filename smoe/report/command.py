"""From finished runs to the paper's self-slimming table and figure, and from all records to the whole report.

python -m smoe.report RUN [RUN ...] [--plot slimming.png] [--json] [--into README.md --block NAME]
python -m smoe.report RUN --curve curve.png
python -m smoe.report --compare RUN_A RUN_B [--k 16] [--json]
python -m smoe.report --part table2 [--results results] [--into README.md --block table2]
python -m smoe.report --all [--results results] [--figures Figs]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from smoe.errors import Parser, one_line
from smoe.files import write_atomic
from smoe.report.collect import collect
from smoe.report.costs import read_encoder_times
from smoe.report.curve import plot_curve
from smoe.report.encoder import encoder_text
from smoe.report.everything import write_report
from smoe.report.figure import plot_slimming
from smoe.report.groups import Block, Group, blocks_of
from smoe.report.predictions import compare_runs, comparison_text
from smoe.report.records import Record, check_result, examples_of, read_result
from smoe.report.tables import slimming_table, with_block
from smoe.report.transfer import columns_of
from smoe.report.transfer_claims import transfer_findings
from smoe.report.transfer_tables import table2_text

PARTS = ("table2", "encoder")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m smoe.report", description="Compare finished runs: their metric at every k.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run folder or a result.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figure (.png, .pdf or .svg)")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="also draw the learning curve of the one RUN folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also write the table into this Markdown file ...")
    parser.add_argument("--block", metavar="NAME", help="... between the comments `NAME: ...` and `end`")
    compare = "instead: two runs on the same examples, of which each has predictions"
    parser.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help=compare)
    parser.add_argument("--k", nargs="+", metavar="K", help="with --compare: of both or of each (all of their experts)")
    parser.add_argument("--part", choices=PARTS, help="instead: Table 2, or pretrained encoders, of all records")
    parser.add_argument("--all", action="store_true", help="instead: report all records under --results")
    parser.add_argument(
        "--results",
        metavar="DIR",
        help="with --all, --part: records; --all writes REPORT.md, report.html there (results)",
    )
    parser.add_argument("--figures", metavar="DIR", help="with --all: gets the plots (Figs)")
    options = parser.parse_args(argv)
    _check(options)
    if options.all:
        return _report_all(options.results or "results", options.figures or "Figs")
    if options.compare is not None:
        ks = (options.k or [None]) * (1 if options.k and len(options.k) == 2 else 2)
        found = compare_runs(tuple(options.compare), tuple(ks))
        return print(json.dumps(found, indent=2) if options.json else comparison_text(found))
    if options.part is not None:
        text = part_text(options.part, options.results or "results")
        if options.into is not None:
            markdown = with_block(options.into.read_text(encoding="utf-8"), options.block, text)
            write_atomic(options.into, markdown)
        return print(text)
    records = _read(options.runs)
    table = slimming_table(records)
    if options.into is not None:  # first of all, since it may not fit
        markdown = with_block(options.into.read_text(encoding="utf-8"), options.block, table)
    if options.plot is not None:
        plot_slimming(records, options.plot)
    if options.curve is not None:
        plot_curve(options.runs[0], options.curve)
    if options.into is not None:
        write_atomic(options.into, markdown)
    if options.json:
        print(json.dumps([_entry(block, group) for block in blocks_of(records) for group in block.groups], indent=2))
    else:
        drawn = {"learning curve": options.curve, "figure": options.plot}
        lines = [f"{name}: {file}" for name, file in drawn.items() if file is not None]
        print("\n\n".join([table, *(["\n".join(lines)] if lines else [])]))


def part_text(part: str, results: str) -> str:
    """A member of ``PARTS``, of all records in ``results``, as plain text. What is left out is said on stderr."""
    runs, problems = collect(results)
    _say_left_out(problems)
    if part == "encoder":
        times, problems = read_encoder_times(results)
        _say_left_out(problems)
        return encoder_text(columns_of(runs, encoders=True), times)
    columns = columns_of(runs)
    return table2_text(columns, transfer_findings(columns))


def _check(options: argparse.Namespace) -> None:
    """ValueError for options that do not go together."""
    if options.compare is not None:
        given = {name: getattr(options, name) for name in ("all", "part", "plot", "curve", "into", "block")}
        for name in [*(["RUN"] if options.runs else []), *(f"--{name}" for name, value in given.items() if value)]:
            raise ValueError(f"{name} has no effect with --compare; leave it out")
        if options.k is not None and len(options.k) > 2:
            raise ValueError(f"--k is given {len(options.k)} numbers; it must be one, or one for each run")
        return
    if options.k is not None:
        raise ValueError("--k has no effect without --compare; leave it out")
    if options.all or options.part:
        mode, others = ("--all", ("into", "block", "part")) if options.all else ("--part", ("figures",))
        given = {name: getattr(options, name) for name in ("plot", "curve", "json", *others)}
        for name in [*(["RUN"] if options.runs else []), *(f"--{name}" for name, value in given.items() if value)]:
            raise ValueError(f"{name} has no effect with {mode}; leave it out")
        return _check_block(options)
    for name in ("results", "figures"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} has no effect without --all or --part; leave it out")
    if not options.runs:
        raise ValueError("the following arguments are required: RUN, or --all")
    _check_block(options)
    if options.json and options.into is not None:
        raise ValueError("--into has no effect with --json; leave it out")
    if options.curve is not None and len(options.runs) != 1:
        raise ValueError(f"--curve is given with {len(options.runs)} runs; it must be one")


def _check_block(options: argparse.Namespace) -> None:
    if (options.into is None) != (options.block is None):
        raise ValueError("--into and --block must be given together: a Markdown file and the name of a block in it")


def _report_all(results: str, figures: str) -> None:
    """Writes the whole report, and says what it wrote and what it left out."""
    written, problems = write_report(results, figures)
    _say_left_out(problems)
    print("\n".join(map(str, written)))


def _say_left_out(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"warning: left out: {one_line(problem)}", file=sys.stderr)


def _read(paths: Sequence[str]) -> list[Record]:
    """The records that can be reported; those that can't are named on stderr. ValueError when none is left."""
    records, problems = [], []
    for path in paths:
        if not Path(path).exists():
            raise ValueError(f"run: {path} does not exist; it must be a run folder or a JSON file")
        try:
            records.append(check_result(read_result(path), path))
        except ValueError as error:
            problems.append(str(error))
    if not records:
        raise ValueError(problems[0] if len(problems) == 1 else f"no run can be reported; the first: {problems[0]}")
    _say_left_out(problems)
    return records


def _entry(block: Block, group: Group) -> dict[str, Any]:
    """One row of the table as data."""
    first = group.records[0]
    means = {key: fmean(group.values(key)) for key in group.keys}
    deviations = {key: stdev(group.values(key)) for key in group.keys} if len(group.records) > 1 else None
    return {
        "model": block.model,
        "dataset": block.dataset,
        "scale": block.scale,
        "method": first["method"],
        "label": group.label,
        "seeds": group.seeds,
        "runs": len(group.records),
        "metric": block.metric,
        "title": block.title,
        "unit": block.unit,
        "direction": block.direction,
        "split": block.split,
        "n": examples_of(first),
        "mean": means,
        "standard_deviation": deviations,
        "parameters": first["parameters"],
    }
