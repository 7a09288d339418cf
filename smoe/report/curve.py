"""The learning curve of one run: train and valid over steps, with k below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoe.json_files import parse_json
from smoe.methods import METHODS
from smoe.report.groups import plain
from smoe.report.records import check_result, read_result
from smoe.report.style import INK, clean_axes, new_figure, save

# (colour, marker, dashes) of valid at each k that a checkpoint is chosen at.
_VALID = [("#0072B2", "o", "-"), ("#D55E00", "s", (0, (5, 2))), ("#009E73", "^", (0, (1, 1.5)))]


def plot_curve(run: str | Path, path: str | Path) -> Path:
    """Draws the learning curve of the finished run in the folder ``run``.

    Above: the deciding metric, on train (mean since the last line of the log) and on valid; where the log has no such
    number of train, the loss in nats stands between. Below: k, one line per layer where layers differ.

    Raises:
        ValueError: the folder has no ``result.json`` or no ``metrics.jsonl`` with numbers, or matplotlib is missing.
    """
    folder, path = Path(run), Path(path)
    record = check_result(read_result(folder), str(run))
    key, lines = record["metric"], _read_log(folder / "metrics.jsonl")
    metric = record["metrics"][key]
    train = _series(lines, "train", key)
    loss = [] if train else _series(lines, "train", "loss")
    splits = sorted({name for line in lines for name in line if name == "valid" or name.startswith("valid_k")})
    ks = _series(lines, "train", "k")
    if not train and not loss and not splits:
        raise ValueError(f"run: {folder / 'metrics.jsonl'} has no numbers of train or valid; a training writes them")
    heights = [3.0, *([2.0] if loss else []), *([1.0] if ks else [])]
    figure = new_figure(7.6, 1.4 + 1.1 * sum(heights))
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    axes[0].set_title(plain(_title(record), 90), fontsize=11, color=INK, loc="left", parse_math=False)
    axes[0].set_ylabel(plain(metric["title"], 40), color=INK, parse_math=False)
    _draw_train(axes[0], train)
    for split, (color, marker, dashes) in zip(splits, _VALID, strict=False):
        label = split.replace("_k", ", k = ")
        steps, values = zip(*_series(lines, split, key) or [(0, float("nan"))], strict=True)
        axes[0].plot(steps, values, color=color, marker=marker, linestyle=dashes, markersize=5, label=label)
    axes[0].legend(frameon=False, fontsize=9)
    if loss:
        _draw_train(axes[1], loss)
        axes[1].set_ylabel("train loss (nats)", color=INK)
    if ks:
        steps = [step for step, _ in ks]
        per_layer = [k if isinstance(k, list) else [k] for _, k in ks]
        for layer in range(min(map(len, per_layer))):
            axes[-1].plot(steps, [k[layer] for k in per_layer], color=INK, linewidth=1.2)
        axes[-1].set_ylabel("k", color=INK)
        axes[-1].set_ylim(bottom=0)
    for one in axes:
        clean_axes(one)
    axes[-1].set_xlabel("training step", color=INK)
    return save(figure, path)


def _draw_train(axes: Any, series: list[tuple[int, Any]]) -> None:
    if series:
        steps, values = zip(*series, strict=True)
        axes.plot(steps, values, color="#888888", linewidth=1.2, label="train")


def _title(record: Mapping[str, Any]) -> str:
    seed = "" if record.get("seed") is None else f", seed {record['seed']}"
    method = METHODS[record["method"]].title if record["method"] in METHODS else record["method"]
    return f"{record['model']}, {record.get('label') or method}, scale {record['scale']}{seed}"


def _read_log(file: Path) -> list[Mapping[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    if not file.is_file():
        raise ValueError(f"run: {file} does not exist; a training writes it")
    texts = file.read_bytes().splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text)
        except ValueError:
            if number < len(texts):
                raise ValueError(f"run: {file}, line {number} is not JSON") from None
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"run: {file}, line {number} has no step")
        lines.append(line)
    return lines


def _series(lines: list[Mapping[str, Any]], split: str, name: str) -> list[tuple[int, Any]]:
    """(step, value) wherever the log has one; it writes null for what is not finite."""
    found = [(line["step"], line[split].get(name)) for line in lines if isinstance(line.get(split), Mapping)]
    return [(step, value) for step, value in found if isinstance(value, (int, float, list))]
