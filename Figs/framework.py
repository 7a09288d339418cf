"""Draws the method in five steps: ``python Figs/framework.py`` writes framework.svg beside this file.

Plain SVG text, so that the file is small and the same on every machine; tests/test_readme.py compares the two. The
drawing has a white background of its own and relies on dark and light alone, not on colours.
"""

from __future__ import annotations

import random
from pathlib import Path

from smoe import k_at

N = 8  # experts in the drawing
CHOSEN = (1, 4, 6)  # by the router

PANEL, GAP, MARGIN, HEIGHT = 164, 30, 22, 284
WIDTH = 2 * MARGIN + 5 * PANEL + 4 * GAP
TOP, BOTTOM = 64, 224  # of what is drawn in a panel; its title is above, its caption below
MIDDLE = (TOP + BOTTOM) / 2

DARK, LIGHT, LINE, TEXT = "#1c4a7e", "#d3deeb", "#5d6b7a", "#1d2733"
WIDE, NARROW = 144, 52  # widths of H hidden units and of d features
PITCH = WIDE / N  # from one expert to the next


def rect(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {extra}/>'


def line(x1: float, y1: float, x2: float, y2: float, color: str = LINE, width: float = 1.2, extra: str = "") -> str:
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}" stroke-width="{width:g}" {extra}/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return line(x1, y1, x2, y2, extra='marker-end="url(#head)"')


def text(x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {style}>{words}</text>'


def expert(x: float, y: float, active: bool, height: float = 20) -> str:
    """A piece of the hidden units; x is its middle."""
    style = "" if active else f'stroke="{LINE}" stroke-width="0.8" stroke-dasharray="2.5 2"'
    return rect(x - PITCH / 2 + 1.5, y, PITCH - 3, height, DARK if active else "#ffffff", style)


def middles(center: float) -> list[float]:
    """Where the N experts of a panel stand."""
    return [center + (e - (N - 1) / 2) * PITCH for e in range(N)]


def dense(center: float) -> list[str]:
    """x (d) -> H hidden units -> y (d), narrow, wide, narrow; from bottom to top."""
    a, b = NARROW / 2, WIDE / 2
    up = f"M{center - a:g} {BOTTOM - 12:g}h{NARROW}L{center + b:g} {MIDDLE + 11:g}h{-WIDE}z"
    down = f"M{center - a:g} {TOP + 12:g}h{NARROW}L{center + b:g} {MIDDLE - 11:g}h{-WIDE}z"
    return [
        f'<path d="{up}{down}" fill="{LIGHT}"/>',
        rect(center - a, BOTTOM - 12, NARROW, 12, LINE),
        rect(center - a, TOP, NARROW, 12, LINE),
        rect(center - b, MIDDLE - 11, WIDE, 22, DARK),
        text(center + a + 10, BOTTOM - 2, "x", 'font-style="italic"'),
        text(center + a + 10, TOP + 10, "y", 'font-style="italic"'),
    ]


def cut(center: float) -> list[str]:
    """The same MLP with white cuts between the experts."""
    parts = dense(center)
    for edge in range(1, N):
        share = edge / N - 0.5
        narrow, wide = center + share * NARROW, center + share * WIDE
        right_edge = f"L{wide + 1.5:g} {MIDDLE - 11:g}v22L{narrow + 0.5:g} {BOTTOM - 12:g}h-1"
        left_edge = f"L{wide - 1.5:g} {MIDDLE + 11:g}v-22z"
        parts.append(f'<path d="M{narrow - 0.5:g} {TOP + 12:g}h1{right_edge}{left_edge}" fill="#ffffff"/>')
    return parts


def route(center: float) -> list[str]:
    """x -> fixed random router, a column of weights per expert -> the experts of the k largest logits -> sum -> y."""
    draw, size, top = random.Random(0), 9, BOTTOM - 71
    frame = f'rx="4" stroke="{LINE}" stroke-width="1.2"'
    parts = [
        rect(center - NARROW / 2, BOTTOM - 12, NARROW, 12, LINE),
        text(center + NARROW / 2 + 10, BOTTOM - 2, "x", 'font-style="italic"'),
        rect(center - WIDE / 2 - 2, top - 5, WIDE + 4, 3 * size + 10, "#ffffff", frame),
        arrow(center, BOTTOM - 14, center, top + 3 * size + 7),
        text(center - 10, BOTTOM - 21, "router", anchor="end"),
        *padlock(center - 60, BOTTOM - 32),
    ]
    for e, x in enumerate(middles(center)):
        for row in range(3):
            grey = draw.choice(("#ffffff", "#d9d9d9", "#a8a8a8", "#707070"))
            parts.append(rect(x - size / 2, top + row * size, size, size, grey, f'stroke="{LINE}" stroke-width="0.6"'))
        parts.append(expert(x, MIDDLE - 27, e in CHOSEN))
        if e in CHOSEN:
            parts += [arrow(x, top - 6, x, MIDDLE - 5), line(x, MIDDLE - 28, center, TOP + 33)]
    parts += [
        f'<circle cx="{center:g}" cy="{TOP + 29:g}" r="9" fill="#ffffff" stroke="{LINE}" stroke-width="1.2"/>',
        text(center, TOP + 33.5, "&#931;", 'font-size="12"'),
        arrow(center, TOP + 19, center, TOP + 3),
        text(center + 12, TOP + 10, "y", 'font-style="italic"'),
    ]
    return parts


def padlock(x: float, y: float) -> list[str]:
    """Fixed: what is locked is not trained."""
    shackle = f'<path d="M{x + 2:g} {y + 5:g}v-2a3 3 0 0 1 6 0v2" fill="none" stroke="{TEXT}" stroke-width="1.4"/>'
    return [shackle, rect(x, y + 5, 10, 7, TEXT, 'rx="1.2"')]


def grow(center: float) -> list[str]:
    """k over the training steps, from N / 2 to N, by the schedule itself."""
    left, right, floor, ceiling, steps = center - 48, center + 74, BOTTOM - 26, TOP + 10, 400
    ks = [k_at(step, steps, N // 2, N) for step in range(steps)]

    def at(step: int, k: int) -> str:
        return f"{left + step * (right - left) / steps:.1f} {floor - k * (floor - ceiling) / N:.1f}"

    stairs = f"M{at(0, ks[0])}"
    for step in range(1, steps):
        if ks[step] != ks[step - 1]:
            stairs += f"L{at(step, ks[step - 1])}L{at(step, ks[step])}"
    stairs += f"L{at(steps, ks[-1])}"
    parts = [f'<path d="{stairs}L{right:g} {floor:g}H{left:g}z" fill="{LIGHT}"/>']
    parts.append(f'<path d="{stairs}" stroke="{DARK}" stroke-width="2.5" fill="none"/>')
    parts += [arrow(left, floor, left, ceiling - 8), arrow(left, floor, right + 8, floor)]
    for k, label in ((N // 2, "N/2"), (N, "N")):
        y = floor - k * (floor - ceiling) / N
        parts += [line(left - 4, y, left, y), text(left - 7, y + 4, label, anchor="end")]
    parts += [text(left - 7, floor + 4, "0", anchor="end"), text((left + right) / 2, floor + 18, "training steps")]
    parts.append(text(left + 12, ceiling - 2, "k", 'font-style="italic"'))
    return parts


def pick(center: float) -> list[str]:
    """The same experts at three values of k."""
    parts = []
    for k, y in ((2, TOP + 18), (4, TOP + 70), (N, TOP + 122)):
        parts += [expert(x, y, e < k) for e, x in enumerate(middles(center))]
        parts.append(text(center - WIDE / 2 + 1, y - 7, f"k = {k}", anchor="start"))
    return parts


STEPS = (
    (dense, "Dense MLP", ("H hidden units,", "all used for every token")),
    (cut, "Cut into N experts", ("H / N hidden units each,", "together as wide as before")),
    (route, "Fixed random router", ("picks k experts per token", "and is never trained")),
    (grow, "Let k grow", ("from N/2 experts to all N", "while the model trains")),
    (pick, "Choose any k", ("at inference,", "with one set of weights")),
)


def drawing() -> str:
    """The whole SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{TEXT}" role="img">',
        "<title>SMoE-Dropout: a dense MLP is cut into experts, a fixed random router picks k of them, k grows during "
        "training, and any k serves at inference</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
        rect(0, 0, WIDTH, HEIGHT, "#ffffff", 'rx="8"'),
    ]
    for i, (draw, title, caption) in enumerate(STEPS):
        center = MARGIN + PANEL / 2 + i * (PANEL + GAP)
        parts.append(text(center, 32, title, 'font-size="15" font-weight="bold"'))
        parts += draw(center)
        parts += [text(center, 250 + 16 * row, words) for row, words in enumerate(caption)]
        if i:
            x = center - PANEL / 2 - GAP / 2
            chevron = f"M{x - 4:g} {MIDDLE - 9:g}l8 9l-8 9"
            parts.append(f'<path d="{chevron}" stroke="{TEXT}" stroke-width="2.5" fill="none"/>')
    return "\n".join((*parts, "</svg>")) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("framework.svg").write_text(drawing(), encoding="utf-8")
