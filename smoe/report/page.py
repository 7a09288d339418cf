"""report.html: one file without a server or network, on which a reader moves k and sees quality and cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from typing import Any

from smoe.report.costs import flops_of, measured_seconds, parameters_of, seconds_of
from smoe.report.groups import plain
from smoe.report.panels import PRETRAINING, table1
from smoe.report.records import values_of
from smoe.report.runs import Cell, Context
from smoe.report.style import INK, styles_of

_SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"]


def page(contexts: Sequence[Context], step_times: list[dict[str, Any]]) -> str:
    """The page as text, its data and Vega inside. ValueError when vl-convert-python, which brings Vega, is missing."""
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        raise ValueError("page: needs vl-convert-python; pip install 'smoe[report]'") from None
    data = [_context(context, step_times) for context in contexts if context.task in PRETRAINING]
    text = json.dumps([entry for entry in data if entry["methods"]], allow_nan=False, sort_keys=True)
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    # No text of a record can end the element that the data stands in.
    escaped = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return template.substitute(data=escaped, library=javascript_bundle().replace("</script", "<\\/script"))


def _context(context: Context, step_times: list[dict[str, Any]]) -> dict[str, Any]:
    methods = []
    for label, cell in table1(context):
        interleaved = measured_seconds(step_times, context.model, context.scale, cell.first.method)
        methods.append(
            {
                "label": plain(label, 60),
                "method": cell.first.method,
                "variant": cell.first.variant,
                "seeds": len(cell.runs),
                "seconds": seconds_of(cell),
                "interleaved": interleaved,
                "points": {key: _point(cell, key) for key in values_of(cell.first.record)},
            }
        )
    ks = sorted({int(key) for method in methods for key in method["points"] if key != "dense"})
    title = context.measure
    entry = {"label": context.label, "measure": title, "ks": ks, "methods": methods}
    return entry | {"chart": _chart(methods, title)}


def _point(cell: Cell, key: str) -> dict[str, float | None]:
    values = list(cell.swept(key).values())
    flops = {kind: flops_of(cell, key, kind) for kind in ("paper", "training_step")}
    return {
        "value": fmean(values),
        "deviation": stdev(values) if len(values) > 1 else None,
        "parameters": parameters_of(cell, key) / 1e6,
        "flops": None if flops["paper"] is None else flops["paper"] / 1e9,
        "step_flops": None if flops["training_step"] is None else flops["training_step"] / 1e9,
    }


def _chart(methods: Sequence[dict[str, Any]], title: str) -> dict[str, Any]:
    """A Vega-Lite chart: the metric over active parameters; the points at the signal ``k`` are filled."""
    rows = [
        {"method": method["label"], "k": 0 if key == "dense" else int(key), "dense": key == "dense", **point}
        for method in methods
        for key, point in method["points"].items()
    ]
    colors, dashes = [], []
    for color, _, dash in styles_of((method["method"], method["variant"]) for method in methods):
        colors.append(color)
        dashes.append([] if dash == "-" else [2 * length for length in dash[1]])
    labels = [method["label"] for method in methods]
    shapes = [_SHAPES[i % len(_SHAPES)] for i in range(len(labels))]
    legend = {"title": None, "labelLimit": 320, "symbolStrokeWidth": 2, "symbolSize": 120, "symbolOpacity": 1}
    color = {"field": "method", "type": "nominal", "scale": {"domain": labels, "range": colors}, "legend": legend}
    dash = {"field": "method", "type": "nominal", "scale": {"domain": labels, "range": dashes}, "legend": legend}
    shape = {"field": "method", "type": "nominal", "scale": {"domain": labels, "range": shapes}, "legend": legend}
    x = {"field": "parameters", "type": "quantitative", "title": "active parameters (million)"}
    y = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": False}}
    numbers = {"value": ".4f", "parameters": ".2f", "flops": ".2f", "step_flops": ".2f"}
    tooltip = [{"field": "method"}, {"field": "k", "title": "k (0: dense)"}]
    tooltip += [{"field": name, "format": form} for name, form in numbers.items()]
    at_k = {"test": "datum.dense || datum.k == k"}
    fill = {"condition": {**at_k, **color}, "value": "white"}
    size = {"condition": {**at_k, "value": 150}, "value": 45}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": 560,
        "height": 340,
        "background": "white",
        "config": {
            "axis": {
                "labelColor": INK,
                "titleColor": INK,
                "titleFontWeight": "normal",
                "labelFontSize": 12,
                "titleFontSize": 13,
            },
            "legend": {"labelFontSize": 13, "rowPadding": 6},
        },
        "params": [{"name": "k", "value": 0}],
        "data": {"values": rows},
        "encoding": {"x": x, "y": y, "color": color},
        "layer": [
            {
                "transform": [{"filter": "datum.dense"}],
                "mark": {"type": "rule", "opacity": 0.5},
                "encoding": {"x": None, "y": y, "strokeDash": dash},
            },
            {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"strokeDash": dash}},
            {
                "mark": {"type": "point", "filled": False, "opacity": 1},
                "encoding": {"shape": shape, "tooltip": tooltip, "fill": fill, "size": size},
            },
        ],
    }
