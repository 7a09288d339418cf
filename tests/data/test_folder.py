"""A folder of prepared data while it is written."""

import errno
import os
import subprocess
import sys
import time

from data.folder import scratch

HOLD = "import sys; from pathlib import Path; from data.folder import scratch\n"
HOLD += "with scratch(Path(sys.argv[1])) as own: print(own.name, flush=True); sys.stdin.read()"


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_what_a_killed_process_left_goes_at_the_next_start_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    held = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        own = held.stdout.readline().strip()
        with scratch(tmp_path), scratch(tmp_path):
            assert own in names(tmp_path) and len(names(tmp_path)) == 3
        assert names(tmp_path) == [own]
    finally:
        held.kill()
        held.communicate()
    with scratch(tmp_path) as new:
        assert names(tmp_path) == [new.name]


def test_without_locks_what_is_left_goes_after_a_day(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("data.folder.fcntl.flock", no_locks)
    for name, age in (("old", 100_000), ("fresh", 100)):
        folder = tmp_path / f".partial-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    with scratch(tmp_path) as own:
        assert own.parent == tmp_path
    assert names(tmp_path) == [".partial-fresh"]
