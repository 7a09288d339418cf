"""Text and tables as Markdown in which nothing that a record says can be more than text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean, stdev

from smoe.report.groups import plain

MISSING = "missing"


def md(text: object, longest: int = 200) -> str:
    """One line of text as Markdown shows it: no markup, no link, no HTML, no end of a table's cell."""
    line = re.sub(r"([\\*_\[\]{}#~&!$@:^])", r"\\\1", plain(text, longest))
    return re.sub(r"(?i)\bwww\.", r"www\\.", line)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table: the first ``texts`` columns to the left, numbers to the right. Cells are Markdown already."""
    lines = [head, [*["---"] * texts, *["---:"] * (len(head) - texts)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table as plain text, aligned to the left: ``rows[0]`` is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def number(value: float | None, digits: int = 4) -> str:
    """A number, or that it is missing."""
    return MISSING if value is None else f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    """A probability to four digits; a smaller one is no 0."""
    return "< 0.0001" if value is not None and value < 0.0001 else number(value)


def mean_and_deviation(values: Sequence[float]) -> str:
    """``2.1494 ± 0.0012``: mean and sample standard deviation; the number alone where there is one."""
    if not values:
        return MISSING
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def seeds(cell_seeds: Sequence[int | None]) -> str:
    """``1, 2, 3 (n = 3)``."""
    return f"{', '.join(map(str, cell_seeds)) or 'not said'} (n = {max(len(cell_seeds), 1)})"
