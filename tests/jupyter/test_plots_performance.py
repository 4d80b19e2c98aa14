"""Figures of performance show the numbers they are given, and can be read without colours."""

from __future__ import annotations

import pytest

from horovod_lm.jupyter import plots
from horovod_lm.scaling import Measurement, Network
from horovod_lm.timeline import Span

STEP = [
    Span("late", "NEGOTIATE_ALLREDUCE", 5.001, 5.002),
    Span("early", "NEGOTIATE_ALLREDUCE", 5.000, 5.002),
    Span("early", "ALLREDUCE", 5.003, 5.010),
    Span("early", "MEMCPY_IN_FUSION_BUFFER", 5.004, 5.005),
    Span("early", "GLOO_ALLREDUCE", 5.005, 5.009),
    Span("late", "ALLREDUCE", 5.006, 5.010),
    Span("unfinished", "NEGOTIATE_ALLREDUCE", 5.0, 5.1),
]
LINK = Network(latency=0.001, bandwidth=1e6)
ROWS = [Measurement(size, 2, LINK.allreduce_seconds(size, 2) * 1.1) for size in (8000, 1000)]
TIMES = {"1 ms": {"0 MB": 0.02, "64 MB": 0.004}, "10 ms": {"0 MB": 0.03, "64 MB": 0.012}}
CURVES = {"10 Gbit/s": [1.0, 0.8, 0.5], "100 Gbit/s": [1.0, 0.9, 0.8]}


def test_a_timeline_has_a_line_for_each_tensor_that_was_reduced_the_first_on_top():
    [axes] = plots.plot_timeline(STEP).axes
    bars = sorted(
        (round(bar.get_y() + 0.45), round(bar.get_x(), 6), round(bar.get_width(), 6))
        for bar in axes.patches
    )
    assert bars[:4] == [(0, 0, 2), (0, 3, 7), (0, 4, 1), (0, 5, 4)]
    assert bars[4:] == [(1, 1, 1), (1, 6, 4)]
    assert axes.yaxis_inverted()


def test_each_kind_of_waiting_has_a_name_in_the_legend():
    plot = plots.plot_timeline(STEP)
    texts = [text.get_text() for text in plot.legends[0].get_texts()]
    assert len(texts) == len(set(texts)) == 4 and "travels" in texts


def test_no_line_is_left_out_for_want_of_a_style():
    five = {str(number): [1.0, 2.0] for number in range(5)}
    with pytest.raises(ValueError, match="1 to 4 lines, not 5"):
        plots.plot_batches([1, 2], five, 1.5)
    with pytest.raises(ValueError, match="1 to 4 networks, not 5"):
        plots.plot_efficiency([1, 2], {"panel": five})


def test_messages_are_points_and_the_model_is_a_line():
    [axes] = plots.plot_message_times({"here": ROWS}, {"here": LINK}).axes
    points, line = axes.lines
    sizes, modelled = line.get_data()
    assert list(points.get_xdata()) == [1000, 8000]
    assert (sizes[0], sizes[-1]) == pytest.approx((1000, 8000)) and len(sizes) > 20
    assert modelled == pytest.approx([1000 * LINK.allreduce_seconds(size, 2) for size in sizes])
    assert list(points.get_ydata()) == pytest.approx([3.3, 11.0])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_settings_are_bars_in_groups_that_say_their_height():
    [axes] = plots.plot_settings(TIMES, "Fusion").axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([20, 4, 30, 12])
    assert [text.get_text() for text in axes.texts] == ["20", "4", "30", "12"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0 MB", "64 MB"]
    assert axes.patches[0].get_hatch() != axes.patches[2].get_hatch()


def test_batches_have_a_mark_where_communication_is_just_hidden():
    [axes] = plots.plot_batches([1, 2, 4], {"alone": [0.1, 0.2, 0.4]}, boundary=2.5).axes
    line, mark = axes.lines
    assert list(line.get_ydata()) == [100, 200, 400] and set(mark.get_xdata()) == {2.5}
    named, marked = (text.get_text() for text in axes.get_legend().get_texts())
    assert named == "alone" and marked.endswith(" 2.5")


def test_efficiency_has_a_panel_for_each_assumption_on_one_scale():
    plot = plots.plot_efficiency([1, 2, 4], {"no overlap": CURVES, "full": CURVES})
    left, right = plot.axes
    assert [list(line.get_ydata()) for line in left.lines] == list(CURVES.values())
    assert left.get_ylim() == right.get_ylim() == (0, 1.05)
    assert left.lines[0].get_linestyle() != left.lines[1].get_linestyle()
    assert (left.get_title(), right.get_title()) == ("no overlap", "full")


def test_predictions_are_ranges_around_what_was_measured():
    [axes] = plots.plot_predictions({"VGG-16": (0.5, 0.8)}, {"VGG-16": 0.68}).axes
    [bar], [point] = axes.patches, axes.lines
    assert bar.get_x() == 0.5 and bar.get_width() == pytest.approx(0.3)
    assert list(point.get_xdata()) == [0.68]


def every_plot() -> list[plots.Plot]:
    return [
        plots.plot_timeline(STEP),
        plots.plot_message_times({"here": ROWS}, {"here": LINK}),
        plots.plot_settings(TIMES, "Fusion"),
        plots.plot_batches([1, 2], {"alone": [0.1, 0.2]}, 1.5),
        plots.plot_efficiency([1, 2, 4], {"no overlap": CURVES}),
        plots.plot_predictions({"a": (0.5, 0.8)}, {"a": 0.7}),
    ]


def test_every_figure_has_a_title_and_axes_with_units():
    for plot in every_plot():
        axes = plot.axes[0]
        assert axes.get_title()
        labels = axes.get_xlabel() + axes.get_ylabel()
        assert any(unit in labels for unit in ("milliseconds", "%"))


def test_a_figure_shows_itself_the_same_at_every_execution():
    for first, second in zip(every_plot(), every_plot(), strict=True):
        assert repr(first) == repr(second) and " at 0x" not in repr(first)
        assert first.png() == second.png()
