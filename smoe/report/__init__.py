"""From records of finished runs to tables and figures, and from nothing else. In the order of execution:

command.py   python -m smoe.report RUN [RUN ...]: reads its options, prints and writes
records.py   reads records and checks them; those of earlier versions come in today's form
groups.py    which runs can be compared, which are the same but for the seed, and what each group is called
tables.py    the groups as text, with the paper's numbers beside
figure.py    the groups as curves over active parameters
"""

from smoe.report.command import main
from smoe.report.figure import plot_slimming
from smoe.report.records import check_result, read_result
from smoe.report.tables import paper_values, slimming_table, with_block

__all__ = ["check_result", "main", "paper_values", "plot_slimming", "read_result", "slimming_table", "with_block"]
