"""``python -m smoe.report``."""

from smoe.errors import run_main
from smoe.report.command import main

run_main(main)
