"""``import smoe`` needs torch only and takes little time on top of it; the core's imports go one way."""

import ast
import graphlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import smoe

# Importing torch takes seconds, so one process does it and then forks children that import smoe for the first time.
CODE = """
import json, os, sys, time
import torch
for _ in range(5):
    child = os.fork()
    if not child:
        before, start = set(sys.modules), time.process_time()
        import smoe
        seconds = time.process_time() - start
        assert callable(smoe.modulize)  # some names are imported at their first use
        new = set(sys.modules) - before
        print(json.dumps({"seconds": seconds, "new": sorted(new)}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_import_needs_torch_alone_and_no_time():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 5
    packages = {name.partition(".")[0] for name in runs[0]["new"]}
    foreign = packages - {"smoe", "torch"} - set(sys.stdlib_module_names)
    assert not foreign, f"import smoe also imports {sorted(foreign)}"
    command_line = {"smoe.cli", "smoe.flops", "smoe.paper", "smoe.report"} & {*runs[0]["new"]}
    assert not command_line, f"import smoe also imports {sorted(command_line)}"
    assert "torch._dynamo" not in runs[0]["new"], "import smoe also imports torch's compiler, which takes a second"
    assert statistics.median(run["seconds"] for run in runs) < 0.3


SMOE = Path(smoe.__file__).parent


def imports() -> dict[str, set[str]]:
    """Module of smoe -> modules of smoe that it imports: at its top, within a function, or for type hints only."""
    paths = {".".join(("smoe", *path.relative_to(SMOE).with_suffix("").parts)): path for path in SMOE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                found[name] |= {sub if (sub := f"{module}.{alias.name}") in paths else module for alias in node.names}
    return found


def test_the_core_has_no_import_cycle_and_does_not_import_what_builds_on_it():
    found, core, new = imports(), set(), {"smoe.methods", "smoe.fastmoe"}
    while new:
        core |= new
        new = {module for name in new for module in found[name]} - core
    order = list(graphlib.TopologicalSorter({name: found[name] for name in core}).static_order())  # raises for a cycle
    assert order.index("smoe.experts") < order.index("smoe.compute.grouped") < order.index("smoe.layer")
    assert not [
        name for name in core if name.startswith(("smoe.parallel", "smoe.modulize", "smoe.train", "smoe.flops"))
    ]
