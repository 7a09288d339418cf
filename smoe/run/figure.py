"""The figure of a self-slimming model: BPC over active parameters, labelled directly, in colours all can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

# Okabe and Ito's palette, which most colour-blind readers can tell apart; each method has its own marker as well.
STYLES = {
    "smoe_dropout": ("#0072B2", "o"),
    "smoe": ("#D55E00", "s"),
    "thor": ("#009E73", "^"),
    "dense_dropout": ("#555555", "D"),
    "dense_concrete_dropout": ("#CC79A7", "v"),
    "dense_dropblock": ("#B07C00", "P"),
}
SPARE = [("#56B4E9", "X"), ("#882255", "<"), ("#117733", ">"), ("#332288", "h"), ("#AA4499", "*"), ("#000000", "d")]
INK, FAINT = "#222222", "#d9d9d9"

Run = tuple[str, Mapping[str, Any]]  # label, result


def draw_slimming(panels: Mapping[str, Sequence[Run]], path: Path) -> Path:
    """Draw one panel for each title and write the file. Results must have been checked by the report."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot: needs matplotlib; pip install matplotlib") from None
    canvas = FigureCanvasAgg(Figure(figsize=(7.6 * len(panels), 4.6), layout="constrained"))
    if path.suffix.lower().lstrip(".") not in canvas.get_supported_filetypes():
        raise ValueError(f"plot: {path} ends in {path.suffix!r}, expected .png, .pdf or .svg")
    for axes, (title, runs) in zip(
        canvas.figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _draw_panel(axes, title, runs)
    canvas.figure.savefig(path, dpi=200)
    return path


def _draw_panel(axes: Any, title: str, runs: Sequence[Run]) -> None:
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=12)
    axes.set_xlabel("active parameters (million)", color=INK)
    axes.set_ylabel("test BPC (lower is better)", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)

    ends, spare = [], list(SPARE)
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for label, result in runs:
        methods.setdefault(label, []).append(result)
    for label, results in methods.items():
        # A run with a label of its own is an ablation: it must look different from the method it varies.
        style = None if results[0].get("label") else STYLES.get(results[0]["method"])
        color, marker = style or (spare.pop(0) if spare else SPARE[-1])
        ends.append((_draw_method(axes, results, color, marker), label, color))
    _mark_experts(axes, [result for _, result in runs])
    _label_ends(axes, ends)


def _draw_method(axes: Any, results: Sequence[Mapping[str, Any]], color: str, marker: str) -> tuple[float, float]:
    """Draw the curve of one method (mean over its runs) and return its last point, in data units."""
    values: dict[float, list[float]] = {}
    for result in results:
        for key, bpc in result["bpc"]["test"].items():
            parameters = result["parameters"]
            x = parameters["total"] if key == "dense" else parameters["active_per_k"][key]
            values.setdefault(x / 1e6, []).append(bpc)
    xs = sorted(values)
    means = [fmean(values[x]) for x in xs]
    if len(xs) == 1:  # one dense model: its dot, and its level carried across for comparison
        axes.axhline(means[0], color=color, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1.5)
    band = {"color": color, "alpha": 0.18, "linewidth": 0, "zorder": 1.8}
    if any(len(values[x]) > 1 for x in xs):
        lows, highs = [min(values[x]) for x in xs], [max(values[x]) for x in xs]
        if len(xs) > 1:
            axes.fill_between(xs, lows, highs, **band)
        else:
            axes.errorbar(xs, means, [[means[0] - lows[0]], [highs[0] - means[0]]], color=color, capsize=3)
    axes.plot(
        xs,
        means,
        color=color,
        marker=marker,
        markersize=6,
        linewidth=1.9,
        markeredgecolor="white",
        markeredgewidth=0.8,
        clip_on=False,
        zorder=3,
    )
    return xs[-1], means[-1]


def _mark_experts(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """A second scale on top with k, when all runs agree on the active parameters at each k."""
    places: dict[int, set[float]] = {}
    for result in results:
        for key in result["bpc"]["test"]:
            if key != "dense":
                places.setdefault(int(key), set()).add(result["parameters"]["active_per_k"][key] / 1e6)
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
