"""Faults injected into tiny trainings of every kind, and whether they survive. Needs no data and no network.

    python -m tests.faults --faults 300 [--seed n] [--only KIND] [--jobs 1] [--json FILE]
    python -m tests.faults --kills 50 [--json FILE]           # SIGKILLs of one training per task, resumed each time
    python -m tests.faults --hygiene 10000 [--json FILE]      # memory, open files, threads and disk of long trainings

It prints a table; the exit code is 1 if anything was lost, hung or failed without one clear line.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))  # where the helpers of all tests are


def main() -> int:
    from faults import drill, hygiene, kills
    from faults.kinds import KINDS

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--only", choices=sorted(KINDS))
    parser.add_argument("--kills", type=int)
    parser.add_argument("--hygiene", type=int, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder)
        if options.kills:
            parts["kills"] = kills.run_kills(root / "kills", options.kills, options.seed)
            print(kills.table(parts["kills"]))
        if options.hygiene:
            parts["hygiene"] = hygiene.run_hygiene(root / "hygiene", options.hygiene)
            print(hygiene.table(parts["hygiene"]))
        if options.faults or not parts:
            parts["drill"] = drill.run_drill(
                root / "drill", options.faults or 300, options.seed, options.only, options.jobs
            )
            print(drill.table(parts["drill"]))
    for name, record in parts.items() if options.json else ():
        drill.write_record(options.json, name, record)
    bad = sum(row[name] for row in parts.get("drill", {}).get("kinds", ()) for name in drill.OUTCOMES[1:])
    bad += sum(not row["identical"] for row in parts.get("kills", {}).get("tasks", ()))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
