"""Files of numbers that are read where they lie, without a copy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import RunError


class MappedFile(np.memmap):
    """A read-only memory map, ``MappedFile(path, dtype=...)``, whose views notice that the file has become shorter.

    To read what is no longer there would end the process by SIGBUS, without a word. RunError instead, in one line, for
    a file that is shorter before it is read; one that becomes so within the microseconds of a read is not noticed.
    """

    def __new__(cls, path: str | Path, dtype: Any) -> MappedFile:
        return super().__new__(cls, path, dtype=dtype, mode="r")

    def __getitem__(self, index: Any) -> Any:
        if self._mmap is not None and (now := self._mmap.size()) < len(self._mmap):
            was = len(self._mmap)
            raise RunError(f"data: {self.filename} has shrunk from {was:,} to {now:,} bytes; prepare the data again")
        return super().__getitem__(index)
