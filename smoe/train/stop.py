"""SIGTERM and SIGINT as a request: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import os
import signal
import time

import torch

from smoe.train.processes import Processes

_SAME_WISH = 1.0  # seconds


class StopRequest:
    """While it lives, SIGTERM and SIGINT ask for a checkpoint after the current step; a later one ends the process."""

    def __init__(self) -> None:
        self._received: float | None = None  # when
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def _on_signal(self, number: int, frame: object) -> None:
        # One wish may come more than once: to the whole group of processes, and passed on by torchrun.
        if self._received is not None and time.monotonic() - self._received > _SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = self._received or time.monotonic()

    def requested(self, processes: Processes) -> bool:
        """Whether any process of the run was asked; the same answer on all."""
        return bool(processes.sum(torch.tensor(float(self._received is not None))).item())

    def release(self) -> None:
        """Give the signals back to whoever had them: all is saved, and a sweep can be done again."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
