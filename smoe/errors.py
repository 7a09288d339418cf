"""How a command ends: one line for what a user or the machine did wrong, a traceback for a bug of ours."""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
STOPPED = 75  # of sysexits.h: a temporary failure, try again

_MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_PATH_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENAMETOOLONG}


class RunError(Exception):
    """The run cannot go on, and neither input nor code is to blame (disk, device, damaged file). Exit code 1."""


class CheckpointError(RunError):
    """A checkpoint could not be written, or none of those there can be read."""


class NonFiniteError(RunError):
    """The loss or its gradient is no longer a finite number."""


class Stopped(RunError):
    """A signal stopped the run, and a checkpoint is written. Without a message another process tells of it."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line like any other, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def one_line(error: BaseException | str, most: int = 2000) -> str:
    """The message as one line that is safe to print: what a file says may hold line breaks and terminal escapes."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return line if len(line) <= most else f"{line[:most]}..."


@contextmanager
def clean_exit(*our_packages: str) -> Iterator[None]:
    """Turn known errors into one line `error: ...` on stderr and an exit code; let everything else show its traceback.

    - `ValueError` raised by this project's own code is a user's mistake: exit 2. The same type raised inside another
      library is taken for a bug and keeps its traceback. `our_packages` adds top-level packages to `smoe`
      and `__main__`.
    - a path that is missing or may not be used: exit 2.
    - `RunError`, a full or failing disk, an accelerator out of memory, another process of the run that is gone: exit 1.
      Ctrl-C: exit 130. `Stopped`, which the same command goes on from: exit 75, under torchrun 0.
    """
    try:
        yield
    except BrokenPipeError:  # `... | head` closed our stdout; nobody is left to read a message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILURE) from None
    except KeyboardInterrupt:
        _stop("interrupted", INTERRUPTED)
    except Stopped as error:
        # For torchrun anything but 0 would be a failure, and a reason to start all again.
        _stop(one_line(error), 0 if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED)
    except RunError as error:
        _stop(one_line(error), FAILURE)
    except ValueError as error:
        if not _raised_by(error, {"smoe", "__main__", *our_packages}):
            raise
        _stop(one_line(error), BAD_INPUT)
    except OSError as error:
        if error.errno in _MACHINE_ERRNOS:
            _stop(_describe(error), FAILURE)
        if error.errno in _PATH_ERRNOS and error.filename is not None:
            _stop(_describe(error), BAD_INPUT)
        raise
    except RuntimeError as error:
        if _lost_contact(error):
            _stop(f"lost contact with another process: {one_line(error)}", FAILURE)
        # torch.OutOfMemoryError, without importing torch here; on a CPU torch raises a plain RuntimeError.
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            raise
        _stop(f"out of memory; a smaller model or batch needs less: {one_line(error)}", FAILURE)


def run_main(main: Callable[..., Any], *args: Any) -> None:
    """Call `main(*args)` as a command and leave the process: `if __name__ == "__main__": run_main(main)`.

    The exit code is what `main` returns (None is 0), or what `clean_exit` makes of its error.
    """
    package = (main.__globals__.get("__package__") or main.__module__).split(".")[0]
    try:
        with clean_exit(package):
            code = main(*args)
            sys.stdout.flush()
    except SystemExit as error:
        code = error.code
    except Exception:
        if not _in_a_group():
            raise
        traceback.print_exc()
        code = FAILURE
    _end_if_in_a_group(code)
    raise SystemExit(code)


def _end_if_in_a_group(code: Any) -> None:
    """Ends the process after its exit handlers if it has a process group.

    Python's own way out would take the modules away under gloo's threads, and now and then abort with another code.
    Destroying the group first is no way out either: it joins those threads while it holds Python's lock, and hangs if
    one of them is about to free a tensor, which takes that lock.
    """
    if _in_a_group():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _in_a_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return one_line(f"{where}{error.strerror}")


def _raised_by(error: BaseException, packages: set[str]) -> bool:
    """Whether the frame that raised belongs to one of these top-level packages."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] in packages


def _lost_contact(error: RuntimeError) -> bool:
    """torch.distributed's errors, without importing torch here; gloo's are plain RuntimeErrors that name its source."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in kinds or "gloo/transport" in str(error)


def _stop(message: str, code: int) -> None:
    if message:
        # In one piece: `print` writes the line's end after it, and under torchrun another process may come between.
        sys.stderr.write(f"error: {message}\n" if code else f"{message}\n")
        sys.stderr.flush()
    raise SystemExit(code)
