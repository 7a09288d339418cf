"""The table in docs/slimming.md is that of its record, in which everything falls with the number of kept experts."""

import json
from pathlib import Path

from benchmarks.slim import table

ROOT = Path(__file__).parents[1]
ROWS = json.loads((ROOT / "results/bench_slim.json").read_text())["rows"]


def test_the_table_is_up_to_date():
    assert table(ROWS) in (ROOT / "docs/slimming.md").read_text(), f"docs/slimming.md lacks\n{table(ROWS)}"


def test_fewer_experts_cost_less():
    assert [row["keep"] for row in ROWS] == [16, 8, 4, 2, 1]
    for name in ("parameters", "file_mb", "peak_mb", "flops", "ms_slimmed"):
        values = [row[name] for row in ROWS]
        assert values == sorted(values, reverse=True) and len(set(values)) == len(values), name


def test_to_keep_all_changes_no_bit_per_byte():
    assert len(set(ROWS[0]["bpc"].values())) == 1
