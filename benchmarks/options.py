"""What the commands that take times have in common: their options, and one line for a bad one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch


def timing_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every timing: repeats, device, threads, clock, json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a busy machine"
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


def parse(parser: argparse.ArgumentParser, **largest: int | None) -> tuple[argparse.Namespace, Callable[[], float]]:
    """The options, PyTorch's threads set, and the clock; ends the program with one line at a bad option.

    largest: by name, more options that must be whole numbers of at least 1, and the most that each may be.
    """
    options = parser.parse_args()
    for name, most in {"repeats": None, "threads": None, **largest}.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not 1 <= value <= (most or value):
                fitting = f"from 1 to {most}" if most else "at least 1"
                parser.exit(2, f"error: --{name} is {value}; it must be {fitting}\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: --device is cuda, but PyTorch finds no CUDA device here; leave it out for the CPU\n")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options, time.process_time if options.clock == "cpu" else time.perf_counter
