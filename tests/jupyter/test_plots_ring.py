"""Figures of the ring show what the simulation holds, and can be read without colours."""

from __future__ import annotations

import pytest
import torch

from horovod_lm.jupyter import plots
from horovod_lm.jupyter.plots.ring import name_of_sum
from horovod_lm.ring import RingState, ring_allreduce


def states(workers: int) -> list[RingState]:
    return ring_allreduce([torch.arange(12.0) + worker for worker in range(workers)])


@pytest.mark.parametrize(
    ("whose", "chunk", "workers", "name"),
    [
        ({2}, 2, 4, "2"),
        ({0, 3}, 3, 4, "3+0"),
        ({0, 1, 3}, 3, 4, "3+0+1"),
        ({0, 1, 2, 3}, 3, 4, "all"),
        ({0, 1, 2, 3}, 0, 8, "4 of 8"),
        ({0}, 0, 1, "0"),
    ],
)
def test_a_sum_is_named_in_the_order_in_which_it_grew(whose, chunk, workers, name):
    assert name_of_sum(frozenset(whose), chunk, workers) == name


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_each_step_has_a_panel_with_the_sum_in_every_cell(workers):
    steps = states(workers)
    plot = plots.plot_ring_steps(steps)
    shown = [axes for axes in plot.axes if axes.get_visible()]
    assert len(shown) == len(steps) == 2 * workers - 1
    for axes, state in zip(shown, steps, strict=True):
        names = [text.get_text() for text in axes.texts]
        assert names == [
            name_of_sum(whose, chunk, workers)
            for row in state.holds
            for chunk, whose in enumerate(row)
        ]
        frames = {(round(frame.get_x() + 0.46), round(frame.get_y() + 0.46))
                  for frame in axes.patches}  # fmt: skip
        assert frames == {(one.chunk, one.receiver) for one in state.messages}


def test_a_fuller_sum_is_darker_in_greys_and_its_text_stays_readable():
    [image] = plots.plot_ring_steps(states(4)).axes[3].images
    greys = [image.cmap(image.norm(share / 4))[:3] for share in range(1, 5)]
    assert all(max(grey) - min(grey) < 0.01 for grey in greys)
    lightness = [sum(grey) / 3 for grey in greys]
    assert lightness == sorted(lightness, reverse=True) and lightness[-1] > 0.5


def test_what_is_sent_is_drawn_for_each_way_from_zero():
    sent = {"star": [0, 1, 2], "ring": [0, 1, 4 / 3]}
    [axes] = plots.plot_sent_by_workers([1, 2, 3], sent).axes
    first, second = axes.lines
    assert list(first.get_ydata()) == sent["star"] and list(second.get_ydata()) == sent["ring"]
    assert first.get_linestyle() != second.get_linestyle()
    assert axes.get_ylim()[0] == 0 and "multiples" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(sent)


def test_a_figure_shows_itself_the_same_at_every_execution():
    for draw in (
        lambda: plots.plot_ring_steps(states(3)),
        lambda: plots.plot_sent_by_workers([1, 2], {"ring": [0.0, 1.0]}),
    ):
        first, second = draw(), draw()
        assert repr(first) == repr(second) and repr(first).startswith("figure: ")
        assert first.png() == second.png()
