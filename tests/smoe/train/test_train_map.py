"""``smoe/train/__init__.py`` is a map of the folder."""

import re
from pathlib import Path

import smoe.train


def test_every_file_is_on_the_map_and_nothing_else():
    files = {path.name for path in Path(smoe.train.__file__).parent.glob("*.py")} - {"__init__.py"}
    named = re.findall(r"\b\w+\.py\b", smoe.train.__doc__)
    assert set(named) == files
