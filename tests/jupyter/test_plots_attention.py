"""The figure of attention's cost shows the times that it is given, beside the square of T."""

from __future__ import annotations

from horovod_lm.jupyter import plots

TIMES = {"written out": [1.0, 5.0, 16.0], "as it runs": [0.5, 1.0, 2.0]}


def test_times_stand_beside_a_line_that_grows_with_the_square():
    [axes] = plots.plot_attention_cost([256, 512, 1024], TIMES).axes
    out, runs, square = axes.lines
    assert list(out.get_ydata()) == [1.0, 5.0, 16.0] and list(runs.get_xdata()) == [256, 512, 1024]
    assert list(square.get_ydata()) == [1.0, 4.0, 16.0]  # through the last time of the first way
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512", "1024"]
    assert len({line.get_linestyle() for line in axes.lines}) == 3


def test_it_has_a_title_axes_with_units_and_the_same_text_whatever_the_times():
    slower = {name: [10 * time for time in times] for name, times in TIMES.items()}
    plot, other = (plots.plot_attention_cost([1, 2, 4], times, "Cost") for times in (TIMES, slower))
    [axes] = plot.axes
    assert axes.get_title() == "Cost"
    assert "words" in axes.get_xlabel() and "milliseconds" in axes.get_ylabel()
    assert repr(plot) == repr(other) and plot.png() != other.png()
