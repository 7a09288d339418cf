"""What all timing programs share: their options, one-line errors, and the record that --json writes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from smoe.environment import cpu_model


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

    Raises ValueError for a bad option: one line and exit code 2 by ``run_main``.

    Args:
        largest: more options that must be whole numbers of at least 1: name -> the largest allowed (None: no limit).
    """
    options = parser.parse_args()
    for name, most in {"repeats": None, "threads": None, **largest}.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not 1 <= value <= (most or value):
                fitting = f"from 1 to {most}" if most else "at least 1"
                raise ValueError(f"--{name} is {value}; it must be {fitting}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but PyTorch finds no CUDA device here; leave it out to use the CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options, time.process_time if options.clock == "cpu" else time.perf_counter


def medians(
    runs: Mapping[str, Callable[[Any], Any]], given: Any, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """name -> median seconds of each of ``runs``, given the same; they take turns, so that other work slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-2, repeats):
        for name, run in runs.items():
            start = clock()
            run(given)
            if repeat >= 0:  # the first two warm up
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def write_record(options: argparse.Namespace, what: str, **content: Any) -> None:
    """Writes ``content`` to --json, if that is given, with the machine and the settings that it was measured with.

    Called after every part, so that an interrupted run keeps what it has measured.
    """
    if options.json is None:
        return
    record = {"what": what, "processor": cpu_model(), "cpus": os.cpu_count()}
    record |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "clock": options.clock}
    if options.device == "cuda":
        record["cuda"] = torch.cuda.get_device_name()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record | content, indent=1) + "\n")
