"""Every parser on a few damaged files; `python -m tests.fuzz` tries as many as there is time for."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.__main__ import table
from tests.fuzz.parsers import PARSERS, contents, run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_damaged_file_is_a_result_or_one_clear_error(parser, tmp_path):
    @settings(
        max_examples=parser.few, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(content=contents(parser))
    def try_it(content):
        run(parser, tmp_path, content)

    for content in parser.good():
        run(parser, tmp_path, content)
    try_it()


def test_the_record_is_of_ten_processor_minutes_of_each_parser_without_findings():
    record = json.loads((ROOT / "results/fuzz.json").read_text())
    assert [row["parser"] for row in record["parsers"]] == [parser.name for parser in PARSERS]
    assert all(row["cpu_seconds"] >= 600 and not row["findings"] for row in record["parsers"])
    assert table(record) in (ROOT / "docs/faults.md").read_text(), f"docs/faults.md lacks\n{table(record)}"
