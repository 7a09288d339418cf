"""The paper's figures from the records of runs: one file per figure and scale, as .png and .svg.

The panels of fine-tuned runs are made by ``kept.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from smoe.report.groups import plain
from smoe.report.panels import FIGURE5, PRETRAINING, Line, Panel, figure1, figure3, is_empty
from smoe.report.runs import Context
from smoe.report.style import INK, Style, clean_axes, cut_off, new_figure, save, styles_of


@dataclass(frozen=True)
class Plot:
    """A figure of the paper at one scale. ``rows``: one list of panels per context for Figure 5, one row otherwise."""

    figure: str
    scale: str
    rows: list[list[Panel]]

    @property
    def stem(self) -> str:
        """Its file's name without the ending, e.g. ``figure5_cpu``."""
        return f"{self.figure}_{re.sub('[^A-Za-z0-9]', '_', self.scale)[:40]}"

    def titles(self) -> list[list[str]]:
        """The title of each panel."""
        of_figure5 = self.figure == "figure5"
        return [[panel.title if of_figure5 else panel.context.label for panel in row] for row in self.rows]


def plots_of(contexts: Sequence[Context]) -> list[Plot]:
    """Figures 1, 3 and 5 where these runs have anything for them; a panel of Figure 5 without runs is there, empty."""
    plots = []
    for scale in dict.fromkeys(context.scale for context in contexts):
        here = [context for context in contexts if context.scale == scale]
        pretrained = [context for context in here if context.task in PRETRAINING]
        figures = {
            "figure1": [figure1(context) for context in pretrained if context.model == "transformer_xl"],
            "figure3": list(map(figure3, pretrained)),
        }
        for name, panels in figures.items():
            if panels := [panel for panel in panels if not is_empty(panel)]:
                plots.append(Plot(name, scale, [panels]))
        rows = [[make(context) for make in FIGURE5.values()] for context in pretrained]
        if rows := [row for row in rows if not all(map(is_empty, row))]:
            plots.append(Plot("figure5", scale, rows))
    return sorted(plots, key=lambda plot: plot.figure)


def draw(plot: Plot, folder: str | Path) -> list[Path]:
    """Writes the figure as PNG and SVG into ``folder``, which must exist."""
    columns = 3 if plot.figure == "figure5" else min(len(plot.rows[0]), 3)
    lines = -(-len(plot.rows[0]) // columns)
    figure = new_figure(5.2 * columns, 4.9 * lines * len(plot.rows))
    parts = figure.subfigures(len(plot.rows), 1, squeeze=False)[:, 0]
    for part, row, titles in zip(parts, plot.rows, plot.titles(), strict=True):
        all_axes = part.subplots(lines, columns, squeeze=False).flat
        if plot.figure == "figure5":
            part.suptitle(plain(row[0].context.label, 120), color=INK, fontsize=12, parse_math=False)
        for axes in all_axes[len(row) :]:
            axes.set_visible(False)
        for axes, panel, title in zip(all_axes[: len(row)], row, titles, strict=True):
            axes.set_title(fill(plain(title, 120), 60), fontsize=11, color=INK, loc="left", parse_math=False)
            _draw_panel(axes, panel)
    return [save(figure, Path(folder) / f"{plot.stem}.{ending}") for ending in ("png", "svg")]


def _draw_panel(axes: Any, panel: Panel) -> None:
    clean_axes(axes)
    axes.set_xlabel(panel.x_label, color=INK)
    axes.set_ylabel(plain(panel.context.measure, 60), color=INK, parse_math=False)
    if is_empty(panel):
        axes.set_xticks([]), axes.set_yticks([])
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=INK)
        return
    styles = styles_of((line.style, line.variant) for line in panel.lines)
    for number, (line, style) in enumerate(zip(panel.lines, styles, strict=True)):
        # Fine-tuned, all lines have points at the same places, whose long bars would hide one another.
        apart = 0 if panel.context.task in PRETRAINING else min(0.05, 0.25 / len(styles))  # octaves
        _draw_line(axes, line, style, 2 ** (apart * (number - (len(styles) - 1) / 2)))
    if panel.parameters:
        means = [[fmean(point.values) for point in line.points if point.values] for line in panel.lines]
        cut_off(axes, means, panel.context.metric["direction"])
    else:
        axes.set_xscale("log", base=2)
        ticks = sorted({point.x for line in panel.lines for point in line.points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    legend = axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1, fontsize=8.5, frameon=False, handlelength=4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_line(axes: Any, line: Line, style: Style, stretch: float = 1) -> None:
    """Means over the seeds, with bars as ``Point.spread`` has them, each at ``stretch`` times its x."""
    color, marker, dashes = style
    points = [point for point in line.points if point.values]
    values = [point.values for point in points]
    spread = list(zip(*(point.spread for point in points), strict=True))  # below, above
    axes.errorbar(
        [point.x * stretch for point in points],
        [fmean(of_seeds) for of_seeds in values],
        yerr=spread if any(map(any, spread)) else None,
        color=color,
        marker=marker,
        linestyle=dashes,
        markersize=6,
        linewidth=1.7,
        capsize=3,
        label=plain(line.label, 60) + _seeds(values),
    )


def _seeds(values: Sequence[Sequence[float]]) -> str:
    counts = sorted({len(of_seeds) for of_seeds in values})
    return "" if counts in ([], [1]) else f" (n = {' or '.join(map(str, counts))})"
