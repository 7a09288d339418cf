"""From finished runs to the paper's self-slimming table and figure; everything comes from result.json files alone.

python -m smoe.run.report RUN [RUN ...] [--plot slimming.png] [--json]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smoe.errors import Parser, run_main
from smoe.files import write_atomic
from smoe.run.folder import read_result

Result = Mapping[str, Any]


def check_result(result: Result, name: str = "result") -> Result:
    """The result itself, if a table and a plot can be made of it; else ValueError naming `name` and the field."""
    for field in ("method", "model", "scale", "dataset", "parameters", "bpc"):
        if field not in result:
            raise ValueError(f"{name}: {field} is missing")
    test = result["bpc"].get("test") if isinstance(result["bpc"], Mapping) else None
    if not isinstance(test, Mapping) or not test:
        raise ValueError(f"{name}: bpc.test is {test!r}, expected a number for each k, or for 'dense'")
    for key, value in test.items():
        if key != "dense" and not (key.isdecimal() and int(key) > 0):
            raise ValueError(f"{name}: bpc.test has key {key!r}, expected a number of experts or 'dense'")
        _check_number(value, f"{name}: bpc.test.{key}")
    parameters = result["parameters"]
    if not isinstance(parameters, Mapping) or "total" not in parameters:
        raise ValueError(f"{name}: parameters.total is missing")
    _check_number(parameters["total"], f"{name}: parameters.total")
    active = parameters.get("active_per_k", {})
    for key in test:
        if key == "dense":
            continue
        if not isinstance(active, Mapping) or key not in active:
            raise ValueError(f"{name}: parameters.active_per_k.{key} is missing, while bpc.test has k = {key}")
        _check_number(active[key], f"{name}: parameters.active_per_k.{key}")
    return result


def slimming_table(
    results: Sequence[Result], paper: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None
) -> str:
    """Test BPC of every run (rows) at every number k of activated experts (columns), as aligned text.

    Runs of one model, dataset and scale share a block. A dense run has one number. With `paper` (such as
    `paper_bpc()`) the blocks at scale `paper` get its figures beside. ValueError when a result lacks a field.
    """
    blocks = []
    for (model, dataset, scale), members in _blocks(results).items():
        known = (paper or {}).get(model, {}) if scale == "paper" else {}
        tests = [result["bpc"]["test"] for result in members]
        ks = sorted({int(key) for test in tests for key in test if key != "dense"})
        dense = any("dense" in test for test in tests)
        columns = [*(str(k) for k in ks), *(["dense"] if dense else [])]
        header = ["method", "seed", "parameters", *(f"k={k}" for k in ks), *(["dense"] if dense else [])]
        rows = [header + (["paper"] if known else [])]
        for result, test in zip(members, tests, strict=True):
            row = [_label(result), str(result.get("seed", "-")), f"{result['parameters']['total'] / 1e6:.2f}M"]
            row += [f"{test[column]:.4f}" if column in test else "-" for column in columns]
            rows.append(
                row
                + ([_paper_cell({} if result.get("label") else known.get(result["method"], {}), test)] if known else [])
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells)
            )
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        title = f"Test BPC (lower is better): {model} on {dataset}, scale {scale}"
        blocks.append("\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]]))
    return "\n\n".join(blocks)


def plot_slimming(results: Sequence[Result], path: str | Path) -> Path:
    """Draw test BPC over active parameters, one line a method, as in the paper's Figure 1; one panel a block.

    Runs that differ in the seed alone are averaged, with a band from the lowest to the highest. The file's ending
    chooses the format (.png, .pdf, .svg). ValueError when a result lacks a field, matplotlib is missing or the
    ending is unknown.
    """
    from smoe.run.figure import draw_slimming

    blocks = _blocks(results)
    panels = {
        f"{model} on {dataset}, scale {scale}": [(_label(result), result) for result in members]
        for (model, dataset, scale), members in blocks.items()
    }
    return draw_slimming(panels, Path(path))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m smoe.run.report", description="Compare finished runs: test BPC at every k.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder or a result.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figure (.png, .pdf or .svg)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also write the table into this Markdown file ...")
    parser.add_argument("--block", metavar="NAME", help="... between the comments `NAME: ...` and `end`")
    options = parser.parse_args(argv)
    results = [check_result(read_result(run), str(run)) for run in options.runs]
    if options.plot is not None:
        plot_slimming(results, options.plot)
    if options.json:
        fields = ("method", "label", "model", "dataset", "scale", "seed", "parameters")
        rows = [{f: r[f] for f in fields if f in r} | {"test_bpc": r["bpc"]["test"]} for r in results]
        print(json.dumps(rows, indent=2))
    else:
        table = slimming_table(results, paper_bpc())
        print(table)
        if options.into is not None:
            write_atomic(options.into, with_block(options.into.read_text(encoding="utf-8"), options.block, table))
        if options.plot is not None:
            print(f"\nfigure: {options.plot}")


def with_block(markdown: str, name: str | None, table: str) -> str:
    """`markdown` with `table`, as a code block, between the comments `<!-- name: ... -->` and `<!-- end -->`."""
    pattern = rf"(<!-- {re.escape(name or '')}: [^\n]*-->\n).*?(<!-- end -->)"
    if not name or not re.search(pattern, markdown, flags=re.S):
        raise ValueError(
            f"block: {name!r}; the file has no comment `<!-- {name}: ... -->` with an `<!-- end -->` after it"
        )
    return re.sub(pattern, lambda found: f"{found[1]}```\n{table}\n```\n{found[2]}", markdown, count=1, flags=re.S)


def paper_bpc() -> dict[str, dict[str, dict[str, float]]]:
    """The paper's test BPC of Table 1 by model and method; keys "half" and "N" are numbers of activated experts."""
    from smoe.paper import paper_results

    bpc: dict[str, dict[str, dict[str, float]]] = {}
    for model, rows in paper_results()["table1"].items():
        for row, cells in rows.items():
            method, _, k = row.partition("_k_")
            bpc.setdefault(model, {}).setdefault(method, {})[k or "dense"] = cells["bpc"]
    return bpc


def _blocks(results: Sequence[Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Checked results by what makes them comparable: model, dataset and scale; in the order given."""
    if not results:
        raise ValueError("results: none given, expected at least one")
    blocks: dict[tuple[str, str, str], list[Result]] = {}
    for number, result in enumerate(results, 1):
        check_result(result, f"result {number}")
        dataset = result["dataset"]
        dataset = dataset.get("name", "?") if isinstance(dataset, Mapping) else dataset
        blocks.setdefault((str(result["model"]), str(dataset), str(result["scale"])), []).append(result)
    return blocks


def _label(result: Result) -> str:
    """The run's own label if it gives one (an ablation), else its method's name in words."""
    from smoe.methods import METHODS

    method = result["method"]
    return str(result.get("label") or (METHODS[method].title if method in METHODS else method))


def _paper_cell(figures: Mapping[str, float], test: Mapping[str, float]) -> str:
    """E.g. `k=8: 1.1776  k=16: 1.1486`, with "half" and "N" read off the run's own largest k."""
    largest = max((int(key) for key in test if key != "dense"), default=0)
    names = {"half": f"k={largest // 2}: ", "N": f"k={largest}: ", "dense": ""}
    return "  ".join(f"{names[key]}{value:.4f}" for key, value in figures.items()) or "-"


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a number")


if __name__ == "__main__":
    run_main(main)
