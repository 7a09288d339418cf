"""The tables in docs/scaling.md match the record and the formulas."""

import json
from pathlib import Path

from benchmarks.scaling import break_even_table, time_table
from benchmarks.wire import tables

ROOT = Path(__file__).parents[1]


def test_tables_are_up_to_date():
    record = json.loads((ROOT / "results/wire_bytes.json").read_text())
    document = (ROOT / "docs/scaling.md").read_text()
    for table in (
        tables(record, ("txl", "bf16", 2), ("txl", "bf16", 4), ("bert", "fp32", 4)),
        time_table(),
        break_even_table(),
    ):
        assert table in document, f"docs/scaling.md lacks\n{table}"


def test_measured_bytes_are_the_formula_and_headers():
    rows = json.loads((ROOT / "results/wire_bytes.json").read_text())["rows"]
    for row in rows:
        for scheme, measured in row["measured"].items():
            assert 0 <= measured - row["formula"][scheme] <= max(0.003 * measured, 100), (row, scheme)
