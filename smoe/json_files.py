"""JSON from files that anybody may have written: a result, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20


def parse_json(content: str | bytes, nan: bool = True) -> Any:
    """What JSON text holds. Without ``nan``, NaN is refused; JSON itself has no such number, but Python writes it.

    Raises ValueError in one line for anything else: not UTF-8, nested too deeply, a number of thousands of digits.
    """
    try:
        return json.loads(content, parse_constant=None if nan else _not_nan)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def load_json(file: Path, nan: bool = True) -> Any:
    """What a JSON file of at most ``MAX_BYTES`` holds. Raises OSError, and ValueError as :func:`parse_json`."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, expected at most {MAX_BYTES}")
    return parse_json(file.read_bytes(), nan)


def _not_nan(name: str) -> float:
    if name == "NaN":  # infinity is a limit in some configurations
        raise ValueError("NaN is no number")
    return float(name)
