"""Tables of finished runs as text, with the paper's numbers beside them, and their place in a Markdown file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from smoe.paper import paper_results
from smoe.report.groups import Block, Group, blocks_of, teacher_of
from smoe.report.markdown import mean_and_deviation
from smoe.report.records import Record


def slimming_table(records: Sequence[Record]) -> str:
    """The deciding metric of every group of runs (rows) at every number k of activated experts (columns).

    Runs of one model, dataset, scale and metric share a block. Within it, runs that agree in everything but the seed
    share a row: the mean over the seeds, the sample standard deviation, and how many there are. A dense run has one
    number. Blocks at scale ``paper`` have the paper's numbers beside. ValueError when a record lacks a field.
    """
    return "\n\n".join(map(_block_table, blocks_of(records)))


def paper_values(block: Block, group: Group) -> dict[str, float]:
    """What the paper prints for a group of runs, by k (``dense`` where there is none); nothing at other scales.

    It has no variants of a method and no encoders of somebody else's. Of a fine-tuning with half of the experts that it
    was pretrained with it prints one number, of one with all of them another.
    """
    record, results = group.records[0], paper_results()
    pretrained = record.get("pretrained")
    pretrained = pretrained if isinstance(pretrained, Mapping) else {}
    if block.scale != "paper" or group.variant or pretrained.get("start_from"):
        return {}
    if teacher := teacher_of(record):
        printed = results["table3"].get(block.dataset, {}).get(teacher)
        return {} if printed is None else {"dense": printed / 100}
    if block.metric in ("bpc", "bits_per_masked_token"):
        cells = {row: cell["bpc"] for row, cell in results["table1"].get(block.model, {}).items()}
    elif block.metric in ("accuracy", "solving_rate"):  # a share here, percent there
        cells = {row: cell / 100 for row, cell in results["table2"].get(block.model, {}).get(block.dataset, {}).items()}
    else:
        return {}
    largest = max((int(key) for key in group.keys if key != "dense"), default=0)
    n = pretrained.get("num_experts") or largest
    names = {"": "dense", "_k_half": str(n // 2), "_k_N": str(n)}
    values = {key: cells[group.method + name] for name, key in names.items() if group.method + name in cells}
    if pretrained:  # fine-tuned with all of the experts that it has
        values = {key: value for key, value in values.items() if key in ("dense", str(largest))}
    return values


def with_block(markdown: str, name: str, table: str) -> str:
    """``markdown`` with ``table`` as a code block between the comments ``<!-- name: ... -->`` and ``<!-- end -->``.

    ValueError when there are no such comments.
    """
    pattern = rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- end -->)"
    if not re.search(pattern, markdown, flags=re.S):
        raise ValueError(
            f"block is {name!r}; the file must have a comment `<!-- {name}: ... -->` with `<!-- end -->` after it"
        )
    return re.sub(pattern, lambda found: f"{found[1]}```\n{table}\n```\n{found[2]}", markdown, count=1, flags=re.S)


def _block_table(block: Block) -> str:
    paper = [paper_values(block, group) for group in block.groups]
    ks = sorted({int(key) for group in block.groups for key in group.keys if key != "dense"})
    columns = [*map(str, ks), *(["dense"] if any("dense" in group.keys for group in block.groups) else [])]
    names = [column if column == "dense" else f"k={column}" for column in columns]
    rows = [["method", "seed", "parameters", *names, *(["paper"] if any(paper) else [])]]
    for group, printed in zip(block.groups, paper, strict=True):
        row = [group.label, _seeds(group), f"{group.parameters('dense') / 1e6:.2f}M"]
        row += [mean_and_deviation(group.values(column)) if column in group.keys else "-" for column in columns]
        rows.append(row + ([_paper_cell(printed)] if any(paper) else []))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    heading = [f"{block.measure[:1].upper()}{block.measure[1:]}: {block.name}"]
    if block.split != "test":
        heading.append("There is no test split with labels: the numbers are those of valid.")
    if any(len(group.records) > 1 for group in block.groups):
        heading.append("Rows with several seeds: mean ± standard deviation over n runs.")
    return "\n".join([*heading, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def _seeds(group: Group) -> str:
    seeds = ", ".join(map(str, sorted(group.seeds))) or "-"
    return seeds if len(group.records) == 1 else f"{seeds} (n = {len(group.records)})"


def _paper_cell(values: Mapping[str, float]) -> str:
    """E.g. ``k=8: 1.1776  k=16: 1.1486``."""
    names = {key: "" if key == "dense" else f"k={key}: " for key in values}
    return "  ".join(f"{names[key]}{value:.4f}" for key, value in values.items()) or "-"
