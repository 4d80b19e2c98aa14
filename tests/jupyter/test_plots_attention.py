"""The figures of attention: its cost beside the square of T, and all heads at a glance."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize(
    "n_layers, n_heads, said", [(1, 4, "1 layer of 4"), (2, 12, "2 layers of 12")]
)
def test_maps_of_heads_fill_the_page_and_are_never_too_small_to_see(n_layers, n_heads, said):
    weights = torch.eye(5).expand(n_layers, n_heads, 5, 5)
    plot = plots.plot_all_heads(weights, torch.zeros(n_layers, n_heads), "Heads")
    assert repr(plot) == f"figure: Heads: {said} heads"
    assert plot.get_figwidth() == pytest.approx(8.0 if n_heads == 4 else 15.6)  # inches
    plot.png()
    for axes in plot.axes:
        assert axes.get_window_extent().width / plot.dpi > 1.1
