"""How lines look in all figures: colours that most colour-blind readers can tell apart, and, for those who print in
black and white, a marker and dashes of their own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

# Okabe and Ito's palette. (colour, marker, dashes) of each method.
STYLES: dict[str, tuple[str, str, Any]] = {
    "smoe_dropout": ("#0072B2", "o", "-"),
    "smoe": ("#D55E00", "s", (0, (5, 2))),
    "thor": ("#009E73", "^", (0, (1, 1.5))),
    "dense_dropout": ("#555555", "D", (0, (6, 2, 1, 2))),
    "dense_concrete_dropout": ("#CC79A7", "v", (0, (3, 3))),
    "dense_dropblock": ("#B07C00", "P", (0, (2, 1, 1, 1))),
}
# Of variants of a method, in the order in which they are drawn.
SPARE: list[tuple[str, str, Any]] = [
    ("#56B4E9", "X", (0, (4, 1.5))),
    ("#882255", "<", (0, (1, 1))),
    ("#117733", ">", (0, (6, 1.5, 1, 1.5))),
    ("#332288", "h", (0, (2, 2))),
    ("#AA4499", "*", (0, (8, 3))),
    ("#000000", "d", (0, (3, 1, 1, 1, 1, 1))),
]
INK, FAINT = "#222222", "#d9d9d9"


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
        figure.savefig(drawn, format=ending, dpi=200, metadata=undated)
    path.write_bytes(drawn.getvalue())
    return path
