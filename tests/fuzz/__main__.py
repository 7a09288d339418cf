"""Fuzzes every parser for some processor minutes each, prints a table: python -m tests.fuzz --minutes 10 [--only NAME]

With --json a record that is there goes on: each parser gets what its minutes lack. Exit status 1 when an input was
found that ends in neither a result nor the one clear error; it is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.parsers import PARSERS, Parser, contents, run

_BATCH = 500  # examples of one call of hypothesis


def fuzz(parser: Parser, seconds: float, slowest_allowed: float = 10.0) -> dict[str, Any]:
    """Tries one parser for so many seconds of the processor; how many inputs it was, and what was found."""
    found: dict[str, str] = {}
    counts = {"result": 0, "error": 0}
    slowest, start, start_cpu = 0.0, time.monotonic(), time.process_time()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def one(content: bytes) -> None:
        nonlocal slowest
        if time.process_time() - start_cpu > seconds:
            return
        begin = time.process_time()
        try:
            counts[run(parser, folder, content)] += 1
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
            if key not in found:
                found[key] = f"{str(error)[:200]!r} for {content[:2000]!r}"
                print(f"{parser.name}: {key}: {found[key]}", flush=True)
        took = time.process_time() - begin
        if took > slowest_allowed:
            found.setdefault("slow", f"{took:.0f} s for {content[:2000]!r}")
        slowest = max(slowest, took)

    options = dict(max_examples=_BATCH, deadline=None, database=None, phases=[Phase.generate])
    while time.process_time() - start_cpu < seconds:
        settings(**options, suppress_health_check=[*HealthCheck])(given(content=contents(parser))(one))()
    spent = {"seconds": round(time.monotonic() - start), "cpu_seconds": round(time.process_time() - start_cpu)}
    row = {"parser": parser.name, "examples": sum(counts.values()) + len(found), "results": counts["result"]}
    return row | spent | {"slowest_seconds": round(slowest, 2), "findings": sorted(found)}


def read_rows(file: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of the record, by parser; none where there is no record."""
    return {row["parser"]: row for row in json.loads(file.read_text())["parsers"]} if file and file.exists() else {}


def added(before: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """The row of both runs of a parser."""
    if before is None:
        return row
    sums = {name: before[name] + row[name] for name in ("examples", "results", "seconds", "cpu_seconds")}
    slowest = max(before["slowest_seconds"], row["slowest_seconds"])
    return row | sums | {"slowest_seconds": slowest, "findings": sorted({*before["findings"], *row["findings"]})}


def write_record(file: Path, row: dict[str, Any]) -> None:
    """Puts a parser's row into the record of all parsers, in the order of PARSERS."""
    rows = read_rows(file) | {row["parser"]: row}
    record = {"python": platform.python_version(), "machine": platform.machine()}
    record["parsers"] = [rows[parser.name] for parser in PARSERS if parser.name in rows]
    file.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    names = ("parser", "inputs", "of them read", "processor minutes", "slowest, s", "findings")
    head = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    rows = (
        f"| {row['parser']} | {row['examples']:,} | {row['results']:,} "
        f"| {row['cpu_seconds'] / 60:.1f} | {row['slowest_seconds']} | {len(row['findings'])} |"
        for row in record["parsers"]
    )
    return "\n".join([*head, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="of the processor, per parser (default: 10)")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARSERS], help="these parsers alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    options = parser.parse_args()
    rows = []
    print(f"{'parser':22} {'examples':>9} {'minutes':>7} {'slowest':>9} findings", flush=True)
    for one in PARSERS:
        if options.only is None or one.name in options.only:
            before = read_rows(options.json).get(one.name)
            left = 60 * options.minutes - (before["cpu_seconds"] if before else 0)
            row = added(before, fuzz(one, left)) if left > 0 else before
            rows.append(row)
            minutes, slowest = row["cpu_seconds"] / 60, f"{row['slowest_seconds']} s"
            line = f"{one.name:22} {row['examples']:9} {minutes:7.1f} {slowest:>9} {len(row['findings'])}"
            print(f"{line} {'; '.join(row['findings'])}", flush=True)
            if options.json is not None:
                write_record(options.json, row)
    return int(any(row["findings"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
