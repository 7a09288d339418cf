"""A folder of prepared data while it is written."""

import os
import time

from data.folder import scratch


def test_abandoned_scratch_goes_after_a_day_and_a_fresh_one_stays(tmp_path):
    for name, age in (("old", 100_000), ("fresh", 100)):
        folder = tmp_path / f".partial-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    with scratch(tmp_path) as own:
        assert own.parent == tmp_path
    assert [folder.name for folder in tmp_path.iterdir()] == [".partial-fresh"]
