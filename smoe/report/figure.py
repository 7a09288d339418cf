"""The figure of a self-slimming model: its metric over active parameters, in colours that most readers can tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from smoe.report.groups import Block, Group, blocks_of, plain
from smoe.report.records import Record
from smoe.report.style import FAINT, INK, clean_axes, cut_off, new_figure, save, styles_of


def plot_slimming(records: Sequence[Record], path: str | Path) -> Path:
    """Draw the deciding metric over active parameters, one line per group, as in the paper's Figure 1.

    One panel per model, dataset, scale and metric. Runs that differ in the seed alone are averaged, with a band from
    the lowest to the highest. The file's ending chooses the format (.png, .pdf, .svg). ValueError when a record lacks
    a field, matplotlib is missing or the ending is unknown.
    """
    blocks, path = blocks_of(records), Path(path)
    figure = new_figure(7.6 * len(blocks), 4.6)
    for axes, block in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True):
        _draw_panel(axes, block)
    return save(figure, path)


def _draw_panel(axes: Any, block: Block) -> None:
    # A name may hold a dollar sign, which is no formula.
    axes.set_title(plain(block.name, 80), fontsize=11, color=INK, loc="left", pad=12, parse_math=False)
    axes.set_xlabel("active parameters (million)", color=INK)
    axes.set_ylabel(plain(block.measure, 60), color=INK, parse_math=False)
    clean_axes(axes)

    ends = []
    # A run with a label of its own is an ablation: it must look different from the method it varies.
    styles = styles_of((group.method, group.variant) for group in block.groups)
    levels = [group for group in block.groups if len(group.keys) == 1]
    for group, (color, marker, dashes) in zip(block.groups, styles, strict=True):
        if group in levels:  # levels at one height take turns, so that each of them is seen
            dashes = (7 * levels.index(group), (4, 7 * len(levels) - 4))
        ends.append((_draw_group(axes, group, color, marker, dashes), plain(group.label, 60), color))
    cut_off(axes, [[fmean(group.values(key)) for key in group.keys] for group in block.groups], block.direction)
    _mark_experts(axes, block.groups)
    _label_ends(axes, ends)


def _draw_group(axes: Any, group: Group, color: str, marker: str, dashes: Any) -> tuple[float, float]:
    """Draw the curve of one group (mean over its runs) and return its last point, in data units."""
    keys = sorted(group.keys, key=group.parameters)
    xs = [group.parameters(key) / 1e6 for key in keys]
    values = [group.values(key) for key in keys]
    means = [fmean(of_seeds) for of_seeds in values]
    if len(xs) == 1:  # one dense model: its dot, and its level carried across for comparison
        axes.axhline(means[0], color=color, linestyle=dashes, linewidth=1.1, zorder=1.5)
    if len(group.records) > 1:
        lows, highs = list(map(min, values)), list(map(max, values))
        if len(xs) > 1:
            axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0, zorder=1.8)
        else:
            axes.errorbar(xs, means, [[means[0] - lows[0]], [highs[0] - means[0]]], color=color, capsize=3)
    axes.plot(
        xs,
        means,
        color=color,
        marker=marker,
        linestyle=dashes,
        markersize=6,
        linewidth=1.9,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=3,
    )
    return xs[-1], means[-1]


def _mark_experts(axes: Any, groups: Sequence[Group]) -> None:
    """A second scale on top with k, when all groups agree on the active parameters at each k."""
    places: dict[int, set[float]] = {}
    for group in groups:
        for key in group.keys:
            if key != "dense":
                places.setdefault(int(key), set()).add(group.parameters(key) / 1e6)
    if not places or any(max(xs) - min(xs) > 0.01 * max(xs) for xs in places.values()):
        return
    top = axes.secondary_xaxis("top")
    top.set_xticks([min(places[k]) for k in sorted(places)], [str(k) for k in sorted(places)])
    top.set_xlabel("activated experts k", fontsize=9, color=INK)
    top.tick_params(colors=INK, labelsize=9, length=3)
    top.spines["top"].set_color(FAINT)


def _label_ends(axes: Any, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Write each label at the height where its line ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.062  # of the axes' height: one line of text
    ends = [((x, min(max(y, low), high)), *rest) for (x, y), *rest in ends]  # a line may end where the axis is cut off
    wanted = sorted(
        (((y - low) / (high - low), x, y, label, color) for (x, y), label, color in ends), key=lambda e: e[0]
    )
    heights = [entry[0] for entry in wanted]
    for _ in range(200):  # push neighbours apart a little at a time, until all have room
        for i in range(1, len(heights)):
            overlap = gap - (heights[i] - heights[i - 1])
            if overlap > 1e-6:
                heights[i - 1] -= overlap / 2
                heights[i] += overlap / 2
    for height, (_, x, y, label, color) in zip(heights, wanted, strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=color,
            fontsize=9.5,
            va="center",
            annotation_clip=False,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
