"""A small drill: every kind of fault once, 25 in all. `python -m tests.faults` is the long one."""

import json
from pathlib import Path

import pytest
from faults import drill, hygiene, kills
from faults.kinds import KINDS

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "results/faults.json").read_text())
DOCUMENT = (ROOT / "docs/faults.md").read_text()


@pytest.mark.slow
def test_faults_lose_nothing_and_hang_nothing(tmp_path):
    record = drill.run_drill(tmp_path, faults=25, seed=0)
    assert {row["kind"] for row in record["kinds"]} == set(KINDS)
    assert sum(row["survived"] for row in record["kinds"]) == record["faults"] >= 25, drill.table(record)


@pytest.mark.parametrize("part, module", [("drill", drill), ("kills", kills), ("hygiene", hygiene)])
def test_the_tables_are_those_of_the_record(part, module):
    table = module.table(RECORD[part])
    assert table in DOCUMENT, f"docs/faults.md lacks\n{table}"


def test_the_record_is_of_a_drill_that_lost_nothing():
    assert RECORD["drill"]["faults"] >= 300
    for row in RECORD["drill"]["kinds"]:
        assert row["survived"] == row["times"], row
    assert all(row["identical"] and row["kills"] >= 50 for row in RECORD["kills"]["tasks"])


def test_long_trainings_hold_no_more_in_the_end():
    for row in RECORD["hygiene"]["tasks"]:
        early, late = row["figures"]
        assert late["step"] >= 10_000
        assert late["rss_mb"] < 1.05 * early["rss_mb"], row
        assert late["checkpoint_folders"] <= 4, row  # the newest two, and the best at one k or two
        for look in (early, late):
            look["mb_each"] = look["checkpoints_mb"] / look["checkpoint_folders"]
        for name in ("open_files", "threads", "mb_each", "log_bytes_per_step"):
            assert late[name] <= 1.02 * early[name], row
