"""How lines look in all figures: colours that most colour-blind readers can tell apart, and, for those who print in
black and white, a marker and dashes of their own."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Style = tuple[str, str, Any]  # colour, marker, dashes

# Okabe and Ito's palette. By method and variant: a method as released has none.
STYLES: dict[tuple[str, str], Style] = {
    ("smoe_dropout", ""): ("#0072B2", "o", "-"),
    ("smoe_dropout", "output_scale k"): ("#56B4E9", "X", (0, (4, 1.5))),
    ("smoe_dropout", "output_scale num_experts"): ("#882255", "<", (0, (1, 1))),
    ("smoe", ""): ("#D55E00", "s", (0, (5, 2))),
    ("thor", ""): ("#009E73", "^", (0, (1, 1.5))),
    ("dense_dropout", ""): ("#555555", "D", (0, (6, 2, 1, 2))),
    ("dense_concrete_dropout", ""): ("#CC79A7", "v", (0, (3, 3))),
    ("dense_dropblock", ""): ("#B07C00", "P", (0, (2, 1, 1, 1))),
}
# Of other lines, in the order in which they are drawn.
SPARE: list[Style] = [
    ("#117733", ">", (0, (6, 1.5, 1, 1.5))),
    ("#332288", "h", (0, (2, 2))),
    ("#AA4499", "*", (0, (8, 3))),
    ("#000000", "d", (0, (3, 1, 1, 1, 1, 1))),
    ("#999933", "p", (0, (4, 1, 1, 1))),
    ("#CC6677", "H", (0, (5, 1))),
]
INK, FAINT = "#222222", "#d9d9d9"
WIDEST = 1800  # pixels of a picture: readable on a page, and figures of many panels stay below a megabyte


def styles_of(lines: Iterable[tuple[str, str]]) -> list[Style]:
    """How the lines of one panel look, each given by its method and variant.

    What stands in ``STYLES`` looks the same in every panel, whatever else is in it. All other lines, and a second one
    of the same method and variant, get the next spare style.
    """
    reserved, spare = dict(STYLES), list(SPARE)
    return [reserved.pop(line, None) or (spare.pop(0) if len(spare) > 1 else spare[0]) for line in lines]


def cut_limits(lines: Sequence[Sequence[float]], direction: str) -> tuple[float, float] | None:
    """The limits of a y axis that is cut off so that the best values can be told apart; None if nothing needs it.

    The axis goes from the best value to four times the span between the lines' best values. It always holds half of
    the points of each line. It is cut only where the worst value lies half as far again.

    Args:
        lines: the values of each. direction: ``lower`` or ``higher``, what is better.
    """
    sign = -1 if direction == "higher" else 1
    ordered = [sorted(sign * value for value in line) for line in lines if line]
    if len(ordered) < 2:
        return None
    best, worst_of_best = min(line[0] for line in ordered), max(line[0] for line in ordered)
    end = max(best + 4 * (worst_of_best - best), *(line[(len(line) - 1) // 2] for line in ordered))
    if max(line[-1] for line in ordered) - best <= 1.5 * (end - best):
        return None
    margin = 0.1 * (end - best)  # for markers and bars
    low, high = sorted((sign * (best - margin), sign * (end + margin)))
    return low, high


def cut_off(axes: Any, lines: Sequence[Sequence[float]], direction: str) -> None:
    """Cuts the y axis off as ``cut_limits`` has it, and says so beside it."""
    if limits := cut_limits(lines, direction):
        axes.set_ylim(limits)
        place = f"below {limits[0]:.3g}" if direction == "higher" else f"above {limits[1]:.3g}"
        axes.set_ylabel(f"{axes.get_ylabel()}\ncut off {place}", color=INK, parse_math=False)


def clean_axes(axes: Any) -> None:
    """Two spines, horizontal lines in the background."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches; ValueError when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot: needs matplotlib; pip install 'smoe[report]'") from None
    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def save(figure: Any, path: Path) -> Path:
    """Writes the figure in the format of the file's ending, whole or not at all; the same figure gives the same bytes.

    ValueError for an unknown ending.
    """
    from matplotlib import rc_context

    ending = path.suffix.lower().lstrip(".")
    if ending not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"plot: {path} ends in {path.suffix!r}; it must be .png, .pdf or .svg")
    drawn = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending)
    with rc_context({"svg.hashsalt": "smoe"}):
        figure.savefig(drawn, format=ending, dpi=min(200, WIDEST / figure.get_figwidth()), metadata=undated)
    path.write_bytes(drawn.getvalue())
    return path
