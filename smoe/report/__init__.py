"""From records of finished runs to tables, figures, findings and a page. In the order of execution:

command.py     python -m smoe.report RUN [RUN ...] | --all: reads its options, prints and writes
records.py     reads records and checks them; those of earlier versions come in today's form

A few runs, as they are:
groups.py      which runs can be compared, which are the same but for the seed, and what each group is called
tables.py      the groups as text, with the paper's numbers beside
figure.py      the groups as curves over active parameters
curve.py       one run's learning curve

All records of a folder (--all):
everything.py  the order of the steps below
collect.py     finds the records
runs.py        a record in the terms that the paper's panels vary, and what it compares with
costs.py       FLOPs and seconds, of the records and of benchmarks.methods
panels.py      which runs each table and figure of the paper takes
claims.py      the paper's findings, one function each; checks.py: what a comparison comes to
statistics.py  intervals and tests
plots.py       the figures; style.py: how lines look in all of them
document.py    REPORT.md; markdown.py: text that stays text
page.py        report.html, from page.html
"""

from smoe.report.command import main
from smoe.report.curve import plot_curve
from smoe.report.everything import write_report
from smoe.report.figure import plot_slimming
from smoe.report.records import check_result, read_result
from smoe.report.tables import paper_values, slimming_table, with_block

__all__ = ["check_result", "main", "paper_values", "plot_curve", "plot_slimming", "read_result", "slimming_table"]
__all__ += ["with_block", "write_report"]
