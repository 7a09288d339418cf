"""An encoder that somebody else has pretrained (docs/pretrained.md): its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smoe.report.kept import ks_of, most_experts_first, name_of, score_at
from smoe.report.markdown import MISSING, md, number, table, text_table
from smoe.report.plots import Plot
from smoe.report.records import parameters_at
from smoe.report.transfer import SETTINGS, Column, Kind, Tuned
from smoe.report.transfer_tables import examples, over_seeds, span, to_dense

_TEXT = """## A pretrained encoder

Not in the paper: a dense encoder that knows something already, cut into experts, adapted to text without labels while k
grows, and fine-tuned, as [docs/pretrained.md](../docs/pretrained.md) tells; the dense one took the same steps. Fewer
experts, all of them activated, are those that the task's training data voted for before fine-tuning: each a training of
its own. The rows with fewer activated ones are of one training with all experts. Intervals as for Table 2. Parameters
are those that a token uses. Megabytes are those of the weights as a file in fp32, milliseconds those of an example in
batches as the run evaluates them, all models in turns on one machine."""

# Of encoder_text: the cells that it shows -> their heads.
_PICKED = {name: name for name in ("method", "experts", "activated", "n", "ours", "to dense")}
_PICKED |= {"95 % of the difference": "95 %", "MB": "MB", "ms": "ms"}


def encoder_parts(
    columns: Sequence[Column], plots: Sequence[Plot], times: Sequence[dict[str, Any]], figures: str
) -> list[str]:
    """The section.

    Args:
        times: rows of ``encoder_times.json``. figures: the folder of the plots as seen from the document.
    """
    if not columns:
        return [_TEXT, "Not run; `bash script/pretrained/all.sh` does."]
    parts = [_TEXT]
    for plot in (plot for plot in plots if plot.figure == "encoder"):
        parts.append(f"![A pretrained encoder, scale {md(plot.scale)}]({figures}/{plot.stem}.png)")
    for column in columns:
        parts += [f"### {md(column.name)}, scale {md(column.scale)}, {SETTINGS[column.setting]}"]
        rows = [_cells(column, tuned, key, times) for tuned, key in _tuned_rows(column)]
        head = [name.removesuffix(" of the difference") for name in rows[0]]
        parts.append(table(head, [[md(row.pop("method")), *row.values()] for row in rows]))
    return parts


def encoder_text(columns: Sequence[Column], times: Sequence[dict[str, Any]]) -> str:
    """The tables of the section as plain text, with fewer columns; a line where there is none."""
    blocks = []
    for column in columns:
        cells = [_cells(column, tuned, key, times) for tuned, key in _tuned_rows(column)]
        for row in cells:
            row["ours"] = row["over seeds"] if "±" in row["over seeds"] else row["ours"]
        said = "mean ± deviation over seeds" if any("±" in row["ours"] for row in cells) else "one seed"
        head = f"{_title(column)}: {column.metric['title'].lower()}, {said}, %"
        rows = [[*_PICKED.values()], *([row[name] for name in _PICKED] for row in cells)]
        blocks.append("\n".join([head, "", *text_table(rows)]))
    return "\n\n".join(blocks) or "Not run."


def _title(column: Column) -> str:
    return f"{column.name}, scale {column.scale}, setting {column.setting}"


def _tuned_rows(column: Column) -> list[tuple[Tuned, str | None]]:
    """What the rows show: a training, and the number of activated experts where not all that there are."""
    rows: list[tuple[Tuned, str | None]] = [(tuned, None) for kind, tuned in column.tuned.items() if kind.kept is None]
    routed = most_experts_first(column.tuned.values())
    rows += [(tuned, None) for tuned in routed]
    for tuned in routed:
        if tuned.kind.kept == tuned.kind.of:
            rows += [(tuned, key) for key in reversed(ks_of(tuned)) if int(key) != tuned.kind.kept]
    return rows


def _cells(column: Column, tuned: Tuned, key: str | None, times: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A row, by the names of its columns."""
    kind, score = tuned.kind, score_at(tuned, key)
    record = tuned.all_runs()[0].record
    k = kind.kept if key is None else int(key)
    difference, interval, p = to_dense(column, tuned) if key is None else ["-"] * 3
    megabytes, milliseconds = _costs(column, kind, k, times)
    return {
        "method": name_of(column, kind),
        "experts": "-" if kind.kept is None else str(kind.kept),
        "activated": "-" if k is None else str(k),
        "ours": f"{100 * score.share:.2f}",
        "95 %": span(*score.interval),
        "n": examples(tuned),
        "to dense": difference,
        "95 % of the difference": interval,
        "p": p,
        "over seeds": over_seeds(tuned.values(key)),
        "parameters": f"{parameters_at(record, 'dense' if k is None else str(k)):,.0f}",
        "MB": megabytes,
        "ms": milliseconds,
    }


def _costs(column: Column, kind: Kind, k: int | None, times: Sequence[dict[str, Any]]) -> list[str]:
    """Megabytes and milliseconds."""
    found = next((row for row in times if _is_of(row, column, kind, k)), {})
    return [number(found[name], 2) if name in found else MISSING for name in ("megabytes", "milliseconds")]


def _is_of(row: dict[str, Any], column: Column, kind: Kind, k: int | None) -> bool:
    mine = (column.encoder, column.dataset, column.scale, kind.method, kind.kept, k)
    return tuple(row.get(name) for name in ("encoder", "dataset", "scale", "method", "experts", "k")) == mine
