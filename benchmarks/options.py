"""The options that all timing programs share, and their one-line errors."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch


def timing_parser(description: str) -> argparse.ArgumentParser:
    """A parser with --repeats, --device, --threads, --clock and --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu counts processor time, for a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser


def parse(parser: argparse.ArgumentParser, **largest: int | None) -> tuple[argparse.Namespace, Callable[[], float]]:
    """Parses the command line, sets the number of PyTorch's threads, and returns the options and the clock.

    A bad option ends the program with one line.

    Args:
        largest: more options that must be whole numbers of at least 1: name -> the largest allowed (None: no limit).
    """
    options = parser.parse_args()
    for name, most in {"repeats": None, "threads": None, **largest}.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not 1 <= value <= (most or value):
                fitting = f"from 1 to {most}" if most else "at least 1"
                parser.exit(2, f"error: --{name} is {value}; it must be {fitting}\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: --device is cuda, but PyTorch finds no CUDA device here; leave it out to use the CPU\n")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options, time.process_time if options.clock == "cpu" else time.perf_counter
