"""Every parser on a few damaged files; `python -m tests.fuzz` tries as many as there is time for."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.parsers import PARSERS, contents, run


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
