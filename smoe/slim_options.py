"""The options of every command that slims a model: ``smoe slim``, ``python -m transformer_xl.slim``, ``bert.slim``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .slim import VOTE_SCORES


def add_slim_options(parser: argparse.ArgumentParser) -> None:
    """Adds --keep, --out, --k, --score and --batches."""
    parser.add_argument("--keep", type=int, required=True, help="experts per layer that stay")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--k", type=int, help="activated experts while the data vote (default: --keep)")
    scores = "how often it is chosen, the sum of its routing weights, or weight times norm of its output (REAP)"
    parser.add_argument("--score", choices=VOTE_SCORES, default="count", help=f"what an expert is judged by: {scores}")
    parser.add_argument("--batches", type=int, default=64, help="batches that vote, at most (default: 64)")


def check_slim_options(options: argparse.Namespace, num_experts: int) -> None:
    """ValueError for a --keep, --k or --batches that does not fit a model of ``num_experts`` per layer."""
    for name, most in (("keep", num_experts), ("k", num_experts), ("batches", None)):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= (most or value):
            allowed = f"from 1 to {most}, the experts of a layer" if most else "at least 1"
            raise ValueError(f"--{name} is {value}; it must be {allowed}")
    if options.k == num_experts > options.keep and options.score == "count":
        raise ValueError(
            f"--k is {options.k}, at which all experts of a layer have the same count; choose less, or another --score"
        )
