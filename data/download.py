"""Download one address to one file: python data/download.py URL FILE MAX_BYTES

A process of its own, so that `data.fetch.Url` can end it at a deadline whatever it waits for. A timeout within the
process would bound each read alone: a name server, headers without end or a byte a second keep it waiting for hours.

Exit status: 0 when FILE is whole, 1 with the reason on stdout when the address won't do, 2 with the error number on
stdout when FILE can't be written.
"""

import http.client
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

CHUNK = 1 << 18
READ_SECONDS = 20.0  # without a single byte
UNUSABLE, CANT_WRITE = 1, 2
_FAILURES = (OSError, http.client.HTTPException, ValueError)  # the last one: what is no address


class _Unusable(Exception):
    """The address won't do; the message says why."""


def download(url: str, file: IO[bytes], max_bytes: int) -> None:
    """Write what is at `url` to `file`. Raises _Unusable; an OSError is the file's alone."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "smoe"})
        response = urllib.request.urlopen(request, timeout=READ_SECONDS)
    except urllib.error.HTTPError as error:
        raise _Unusable(f"HTTP {error.code} {error.reason}") from error
    except _FAILURES as error:
        raise _Unusable(getattr(error, "reason", error)) from error
    with response:
        length = response.length  # of a Content-Length that is a number, else None
        if length is not None and length > max_bytes:
            raise _Unusable(f"{length} bytes, expected at most {max_bytes}")
        done = 0
        with _progress(length, url.rsplit("/", 1)[-1]) as advance:
            while chunk := _read(response):
                done += len(chunk)
                if done > max_bytes:
                    raise _Unusable(f"more than {max_bytes} bytes")
                file.write(chunk)
                advance(len(chunk))
        # A connection that closes early ends the loop like a complete one.
        if length is not None and done < length:
            raise _Unusable(f"connection closed after {done} of {length} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)
    except _FAILURES as error:
        raise _Unusable(error) from error


@contextmanager
def _progress(length: int | None, label: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda n: None
        return
    with tqdm(total=length, desc=label, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update


def main(url: str, path: str, max_bytes: str) -> int:
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the parent too, which tells of it
    try:
        with open(path, "wb") as file:
            download(url, file, int(max_bytes))
    except _Unusable as error:
        with suppress(BrokenPipeError):  # the parent is gone
            print(error, flush=True)
        return UNUSABLE
    except OSError as error:
        print(error.errno)
        return CANT_WRITE
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
