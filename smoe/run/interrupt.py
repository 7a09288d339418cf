"""SIGTERM and SIGINT as a request: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import signal
from typing import Any

import torch


class StopRequest:
    """While it lives, SIGTERM and SIGINT ask for a checkpoint after the current step; a second one ends the process."""

    def __init__(self) -> None:
        self._received = False
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def _on_signal(self, number: int, frame: object) -> None:
        self._received = True
        signal.signal(number, signal.SIG_DFL)

    def requested(self, accelerator: Any) -> bool:
        """Whether any process of the `accelerate.Accelerator` was asked; the same answer on all."""
        if accelerator.num_processes == 1:
            return self._received
        flag = torch.tensor(float(self._received), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())

    def release(self) -> None:
        """Give the signals back to whoever had them: all is saved, and a sweep can be done again."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
