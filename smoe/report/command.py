"""From finished runs to the paper's self-slimming table and figure.

python -m smoe.report RUN [RUN ...] [--plot slimming.png] [--json] [--into README.md --block NAME]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from smoe.errors import Parser, one_line
from smoe.files import write_atomic
from smoe.report.figure import plot_slimming
from smoe.report.groups import Block, Group, blocks_of
from smoe.report.records import Record, check_result, examples_of, read_result
from smoe.report.tables import slimming_table, with_block


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m smoe.report", description="Compare finished runs: their metric at every k.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder or a result.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figure (.png, .pdf or .svg)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also write the table into this Markdown file ...")
    parser.add_argument("--block", metavar="NAME", help="... between the comments `NAME: ...` and `end`")
    options = parser.parse_args(argv)
    if (options.into is None) != (options.block is None):
        raise ValueError("--into and --block must be given together: a Markdown file and the name of a block in it")
    if options.json and options.into is not None:
        raise ValueError("--into has no effect with --json; leave it out")
    records = _read(options.runs)
    table = slimming_table(records)
    if options.into is not None:  # first of all, since it may not fit
        markdown = with_block(options.into.read_text(encoding="utf-8"), options.block, table)
    if options.plot is not None:
        plot_slimming(records, options.plot)
    if options.into is not None:
        write_atomic(options.into, markdown)
    if options.json:
        print(json.dumps([_entry(block, group) for block in blocks_of(records) for group in block.groups], indent=2))
    else:
        print(table + (f"\n\nfigure: {options.plot}" if options.plot is not None else ""))


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
    for problem in problems:
        print(f"warning: left out: {one_line(problem)}", file=sys.stderr)
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
