"""How preparing data fails: one printable line and an exit status, and nothing half-written."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

BAD_INPUT, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143


class SourceError(Exception):
    """One source can't be used, the next one may be; the message is one line that says why."""


class DownloadError(Exception):
    """No source can be used; the message is one line that names each and why."""


def printable(text: object, max_length: int = 300) -> str:
    """`text` as one line that is safe to print: what a server sends may hold line breaks and terminal escapes."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split()) or type(text).__name__
    return line if len(line) <= max_length else f"{line[:max_length]}..."


def run(name: str, out: Path, work: Callable[[], object]) -> int:
    """Do `work`, which writes to `out`, and return the exit status: 0, or that of a failure told in one line on stderr.

    2 for a ValueError (bad input), 1 for DownloadError and for OSError (a full disk, a folder without permission), 130
    for Ctrl-C. SIGTERM ends the process with 143, by an exception, so that half-written files are removed.
    """
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        work()
    except ValueError as error:
        return _fail(name, str(error), BAD_INPUT)
    except DownloadError as error:
        return _fail(name, str(error), FAILURE)
    except OSError as error:
        where = f"{error.filename}" if error.filename is not None else f"can't write to {out}"
        return _fail(name, f"{where}: {error.strerror or error}", FAILURE)
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing written", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _fail(name: str, message: str, status: int) -> int:
    print(f"error: {name}: {printable(message, 4000)}", file=sys.stderr)
    return status
