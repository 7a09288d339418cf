"""A worker whose torchrun is gone ends too: nothing would restart it, and its peers could wait for it in vain."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

LAUNCHER = "SMOE_LAUNCHER"  # set by script/launch.py, since it may be gone before a worker can ask who its parent is


def end_with_launcher() -> None:
    """From now on this process gets SIGTERM when the process that started it is gone: a training then writes a
    checkpoint and stops. Does nothing unless torchrun started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = int(os.environ.get(LAUNCHER, os.getppid()))
        threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    print("warning: torchrun is gone; this process stops", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
