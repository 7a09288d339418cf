"""The server that starts the commands of other tests."""

import gc
import sys

from commands import SERVER


def _count_frozen() -> None:
    sys.exit(3 if gc.get_freeze_count() else 4)


def test_children_do_not_collect_what_the_server_has_loaded():
    """It would cost each of hundreds of commands half a second."""
    child = SERVER.Process(target=_count_frozen)
    child.start()
    child.join(60)
    assert child.exitcode == 3, "tests/frozen_server.py was not loaded; pytest must start in the repository's root"
