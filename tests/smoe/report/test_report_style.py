"""How the figures look: which style a line gets, where an axis is cut off, what stands beside it."""

from __future__ import annotations

import pytest
from made_up import fine_tuned, made_up
from matplotlib.figure import Figure

from smoe.methods import METHODS
from smoe.report import plot_slimming
from smoe.report.groups import variant_of
from smoe.report.kept import kept_plots
from smoe.report.plots import draw, plots_of
from smoe.report.runs import contexts_of, read_run
from smoe.report.style import SPARE, STYLES, WIDEST, cut_limits, new_figure, save, styles_of
from smoe.report.transfer import columns_of

SCALED = "output_scale num_experts"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Instead of being saved, figures are collected here."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def figures_of(records: list[dict], drawn: list, tmp_path) -> dict[str, Figure]:
    """Each plot of these records by its name."""
    figures = {}
    runs = [read_run(record, "record") for record in records]
    for plot in plots_of(contexts_of(runs)) + kept_plots("figure4", columns_of(runs)):
        draw(plot, tmp_path)
        figures[plot.figure] = drawn[-1]
    return figures


def colors_of(axes) -> dict[str, str]:
    """By label, of a figure with a legend."""
    handles, labels = axes.get_legend_handles_labels()
    return {label: handle.lines[0].get_color() for label, handle in zip(labels, handles, strict=True)}


def all_right(method: str, **fields) -> dict:
    """A fine-tuning that is right on 60 of 100 examples."""
    keys = ("1", "4", "16") if METHODS[method].routed else ("dense",)
    return fine_tuned(method, right={key: [True] * 60 + [False] * 40 for key in keys}, **fields)


# ---- styles


def test_every_style_is_another():
    styles = [*STYLES.values(), *SPARE]
    for part in range(3):
        assert len({str(style[part]) for style in styles}) == len(styles)


def test_a_reserved_style_goes_to_nothing_else():
    ours, scaled = ("smoe_dropout", ""), ("smoe_dropout", SCALED)
    lines = [("", ""), scaled, ours, ("smoe", SCALED), ours, ("", SCALED)]
    assert styles_of(lines) == [SPARE[0], STYLES[scaled], STYLES[ours], *SPARE[1:4]]
    assert styles_of([scaled]) == [STYLES[scaled]]  # whether or not the method as released is there
    many = styles_of([("", "")] * (len(SPARE) + 2))
    assert many[: len(SPARE)] == SPARE and many[-1] == SPARE[-1]


def test_a_variant_is_what_departs_from_the_release():
    released = {"score": "softmax_after_topk", "output_scale": "1", "layers": "all", "router": "random", "steps": "9"}
    released["expert_dropout"] = "0.1"  # its rate is one of the model's
    assert variant_of("smoe_dropout", released) == ""
    assert variant_of("smoe_dropout", released | {"output_scale": "num_experts"}) == SCALED
    assert (
        variant_of("smoe_dropout", released | {"output_scale": "k", "router": "hash"}) == "output_scale k, router hash"
    )
    assert variant_of("dense_dropout", {"output_scale": "k"}) == ""
    kept = read_run(all_right("smoe_dropout", keep=8, output_scale=16), "record")
    assert kept.variant == SCALED  # as it was trained


def test_a_variant_looks_the_same_in_every_figure(drawn, tmp_path):
    scaled = made_up("smoe_dropout", output_scale="num_experts") | {"label": "scaled"}
    dense, released = made_up("dense_dropout"), made_up("smoe_dropout")
    name, title = f"SMoE-Dropout, {SCALED}", METHODS["smoe_dropout"].title
    for records in ([dense, scaled], [dense, released, scaled], [scaled, released, dense]):
        figures = figures_of(records, drawn, tmp_path)
        plot_slimming(records, tmp_path / "a.png")
        colors = {text.get_text(): text.get_color() for text in drawn[-1].axes[0].texts}
        for of_figure in (colors_of(figures["figure1"].axes[0]), colors_of(figures["figure3"].axes[0])):
            assert of_figure[name] == colors[next(label for label in colors if label.startswith("scaled"))]
            assert of_figure[name] == STYLES["smoe_dropout", SCALED][0]
            assert of_figure.get(title, "#0072B2") == "#0072B2"
    # A run that says of itself that it is another one does not look as the method does.
    plot_slimming([dense, released | {"label": "longer"}], tmp_path / "a.png")
    assert drawn[-1].axes[0].texts[0].get_color() != STYLES["smoe_dropout", ""][0]
    assert "#0072B2" not in [text.get_color() for text in drawn[-1].axes[0].texts]
    # Fine-tuning has a schedule of its own, and k = N throughout.
    plot_slimming([all_right("smoe_dropout")], tmp_path / "a.png")
    assert drawn[-1].axes[0].texts[0].get_color() == STYLES["smoe_dropout", ""][0]


# ---- the y axis


CURVE = [7.0, 5.0, 3.0, 2.5, 2.4, 2.2]


@pytest.mark.parametrize(
    "lines, limits",
    [
        ([CURVE, [2.0]], (2.0, 2.8)),
        ([CURVE, [2.15]], (2.15, 2.5)),  # four times the span would hide more than half of the curve
        ([CURVE, [2.0], [2.5, 2.6]], (2.0, 4.0)),
        ([CURVE, [2.2]], (2.2, 2.5)),  # no span at all
        ([CURVE], None),  # nothing to tell apart
        ([[2.5, 2.2], [2.0]], None),  # all of it is within the limits
        ([[3.1, 2.2], [2.0]], None),  # hardly beyond them
        ([[3.3, 2.2], [2.0]], (2.0, 2.8)),
        ([[], []], None),
    ],
)
def test_an_axis_is_cut_off_where_the_best_values_can_be_told_apart(lines, limits):
    found = cut_limits(lines, "lower")
    if limits is None:
        assert found is None
        return
    margin = 0.1 * (limits[1] - limits[0])
    assert found == pytest.approx((limits[0] - margin, limits[1] + margin))
    mirrored = cut_limits([[10 - value for value in line] for line in lines], "higher")
    assert mirrored == pytest.approx((10 - found[1], 10 - found[0]))


def test_figures_say_where_they_are_cut_off(drawn, tmp_path):
    steep = made_up("smoe_dropout")
    steep["metrics"]["bpc"]["test"] |= {"1": 8.0, "2": 6.0}
    records = [made_up("dense_dropout"), steep]
    plain_axes = figures_of([made_up("dense_dropout"), made_up("smoe")], drawn, tmp_path)["figure1"].axes[0]
    assert plain_axes.get_ylabel() == "test BPC (lower is better)"
    axes = figures_of(records, drawn, tmp_path)["figure1"].axes[0]
    plot_slimming(records, tmp_path / "a.png")
    for one in (axes, drawn[-1].axes[0]):
        top = one.get_ylim()[1]
        assert top < 3 and one.get_ylabel().endswith(f"better)\ncut off above {top:.3g}")
        assert all(line.get_clip_on() for line in one.lines)
    # A line that ends where nothing is shown is labelled at the edge.
    steep["metrics"]["bpc"]["test"] |= {"1": 2.3, "2": 2.2, "16": 9.0}
    plot_slimming(records, tmp_path / "a.png")
    axes = drawn[-1].axes[0]
    assert max(text.xy[1] for text in axes.texts) == axes.get_ylim()[1] < 3


def test_levels_at_one_height_take_turns(drawn, tmp_path):
    dense = [made_up(method) for method in METHODS if not METHODS[method].routed]
    plot_slimming([*dense, made_up("smoe")], tmp_path / "a.png")
    levels = [line for line in drawn[0].axes[0].lines if list(line.get_xdata()) == [0, 1]]
    offsets = sorted(line._dash_pattern[0] / line.get_linewidth() for line in levels)
    (on, off) = (length / levels[0].get_linewidth() for length in levels[0]._dash_pattern[1])
    assert offsets == pytest.approx([0, 7, 14]) and on < 7 and on + off == pytest.approx(21)


# ---- Figure 4


def test_figure_4_names_the_setting(drawn, tmp_path):
    paper, stopped = {"epochs": 3, "batch_size": 64}, {"epochs": 30, "patience": 5}
    records = [all_right(method, **config) for config in (paper, stopped) for method in ("dense_dropout", "smoe")]
    records += [all_right(method, steps=900) for method in ("dense_dropout", "smoe", "thor")]
    records += [all_right(method, steps=800) for method in ("dense_dropout", "smoe")]  # fewer methods: not the standard
    (axes, *others) = figures_of(records, drawn, tmp_path)["figure4"].axes
    titles = [one.get_title(loc="left") for one in (axes, *others) if one.get_visible()]
    assert titles == [f"transformer_xl on sst2, scale cpu, setting {setting}" for setting in ("paper", "all", "own")]
    assert axes.get_xlabel() == "experts, kept or activated"
    assert [len(one.containers) for one in (axes, *others)] == [2, 2, 3]


def test_figure_4_moves_the_points_of_lines_apart(drawn, tmp_path):
    records = [all_right(method) for method in ("dense_dropout", "smoe", "smoe_dropout", "thor")]
    (axes,) = figures_of(records, drawn, tmp_path)["figure4"].axes
    lasts = [container.lines[0].get_xdata()[-1] for container in axes.containers]
    assert len(set(lasts)) == 4 and lasts == sorted(lasts) and lasts == pytest.approx([16] * 4, rel=0.1)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "16"]
    depths = [made_up(method, num_layers=n) for n in (2, 4, 8) for method in ("smoe", "smoe_dropout")]
    axes = figures_of(depths, drawn, tmp_path)["figure5"].axes[0]
    assert [list(container.lines[0].get_xdata()) for container in axes.containers] == [[2, 4, 8]] * 2


def test_a_wide_picture_has_fewer_dots_per_inch(tmp_path):
    for width, pixels in ((5, 1000), (15, WIDEST)):
        save(new_figure(width, 1), tmp_path / "a.png")
        header = (tmp_path / "a.png").read_bytes()[16:20]
        assert int.from_bytes(header, "big") == pixels
