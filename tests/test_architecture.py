"""The arrows of the house: who may import whom. The contracts are in pyproject.toml, under [tool.importlinter]."""

import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGES = ("smoe", "transformer_xl", "bert")


def test_imports_keep_the_contracts():
    # In a process of its own: it configures logging for the whole process.
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_takes_part_in_an_import_cycle():
    """Module by module, imports for type hints included; the contract compares neighbours, so it can't see a module
    that imports the package it lies in."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert graph.count_imports() > len(graph.modules) > 50
    cycles = {
        frozenset(back): " -> ".join((module, *back))
        for module in sorted(graph.modules)
        for imported in graph.find_modules_directly_imported_by(module)
        if (back := graph.find_shortest_chain(importer=imported, imported=module))
    }
    assert not cycles, "\n".join(cycles.values())
