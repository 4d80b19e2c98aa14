"""Figures of failures show the numbers they are given, and can be read without colours."""

from __future__ import annotations

import pytest

from horovod_lm.jupyter import plots

WHOLE = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
RESUMED = {"all of it": [4.0, 3.0, 2.0], "without the moments": [4.0, 3.5, 2.5]}
ROWS = [
    {"phase": "train", "step": step, "loss": 7.0 - step, "world_size": ranks}
    for step, ranks in enumerate([2, 2, 1, 1, 2], start=1)
] + [{"phase": "validation", "step": 5, "loss": 2.5, "world_size": 2}]


def test_partings_draws_each_resumed_run_over_the_end_of_the_whole():
    plot = plots.plot_partings(WHOLE, RESUMED)
    assert [axes.get_title() for axes in plot.axes] == list(RESUMED)
    for axes, losses in zip(plot.axes, RESUMED.values(), strict=True):
        whole, resumed, resumed_at = axes.lines
        assert list(whole.get_ydata()) == WHOLE and list(whole.get_xdata()) == [1, 2, 3, 4, 5, 6]
        assert list(resumed.get_ydata()) == losses and list(resumed.get_xdata()) == [4, 5, 6]
        assert whole.get_linestyle() != resumed.get_linestyle()
        assert set(resumed_at.get_xdata()) == {3.5}
    assert len(plot.axes[0].get_legend().get_texts()) == 3


def test_partings_of_a_long_run_begin_shortly_before_it_was_resumed():
    [axes] = plots.plot_partings([1.0] * 100, {"all of it": [1.0] * 40}).axes
    assert axes.lines[0].get_xdata()[0] == 55


def test_partings_hides_the_panels_that_it_does_not_need():
    plot = plots.plot_partings(WHOLE, {str(number): [2.0] for number in range(4)})
    assert [axes.axison for axes in plot.axes] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("resumed", [{}, {"too long": [1.0] * 7}])
def test_what_is_not_the_end_of_the_run_is_refused(resumed):
    with pytest.raises(ValueError, match="the end of the whole run"):
        plots.plot_partings(WHOLE, resumed)


def test_world_draws_the_loss_over_the_ranks_and_marks_each_change():
    loss, ranks = plots.plot_world(ROWS).axes
    assert list(loss.lines[0].get_ydata()) == [6.0, 5.0, 4.0, 3.0, 2.0]
    assert list(ranks.lines[0].get_ydata()) == [2, 2, 1, 1, 2]
    for axes in (loss, ranks):
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert marks == [2.5, 4.5]
    assert ranks.get_ylim()[0] == 0 and loss.get_xlim() == ranks.get_xlim()


def every_plot() -> list[plots.Plot]:
    return [plots.plot_partings(WHOLE, RESUMED), plots.plot_world(ROWS)]


def test_every_figure_has_a_title_and_axes_with_units():
    partings, world = every_plot()
    assert partings.get_suptitle() and world.axes[0].get_title()
    assert partings.axes[0].get_ylabel() == "loss (nats per token)" == world.axes[0].get_ylabel()
    assert {axes.get_xlabel() for axes in partings.axes} == {"optimizer step"}
    assert world.axes[1].get_xlabel() == "optimizer step" and world.axes[1].get_ylabel() == "ranks"


def test_a_figure_shows_itself_the_same_at_every_execution():
    for first, second in zip(every_plot(), every_plot(), strict=True):
        assert repr(first) == repr(second) and " at 0x" not in repr(first)
        assert first.png() == second.png()
