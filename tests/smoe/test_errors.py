"""How a command ends, without starting one."""

from __future__ import annotations

import errno
import fractions
import subprocess
import sys

import pytest

from smoe.errors import CheckpointError, clean_exit, run_main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("n: 0,\n  expected 1 or more"), 2, "error: n: 0, expected 1 or more"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "error: x.bin: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), 2, "error: xx: File name too long"),
        (CheckpointError("checkpoint step-3: broken"), 1, "error: checkpoint step-3: broken"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "error: out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory; "),
    ],
)
def test_known_errors_are_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as caught, clean_exit(__name__):
        raise error
    shown = capsys.readouterr().err
    assert caught.value.code == code
    assert shown.startswith(line) and shown.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("bug"), RuntimeError("shape"), OSError(errno.EBADF, "Bad file descriptor")])
def test_bugs_pass_through(error):
    with pytest.raises(type(error)), clean_exit(__name__):
        raise error


def test_a_value_error_from_another_library_is_a_bug():
    with pytest.raises(ValueError, match="Invalid literal"), clean_exit(__name__):
        fractions.Fraction("one")


@pytest.mark.parametrize("returned, code", [(None, None), (0, 0), (3, 3)])
def test_run_main_exits_with_what_main_returns(returned, code):
    with pytest.raises(SystemExit) as caught:
        run_main(lambda value: value, returned)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("raise ValueError('n: 0')", 2, "error: n: 0\n"),
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("[].pop()", 1, "..."),
    ],
)
def test_a_process_among_others_ends_at_once_with_its_code(end, code, message, tmp_path):
    """Python's own end would now and then abort or hang, with gloo's threads still there; exit handlers run."""
    script = f"""
import atexit, threading, time
import torch.distributed as dist
from smoe.errors import run_main

def main():
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
    {end}

atexit.register(print, "handler")
threading.Thread(target=time.sleep, args=(100,)).start()  # Python's own end would wait for it
run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (code, "handler\n")
    if message == "...":  # a bug of ours
        assert done.stderr.startswith("Traceback") and done.stderr.endswith("IndexError: pop from empty list\n")
    else:
        assert done.stderr == message
