"""Figures of generation show the numbers they are given, and can be read without colours."""

from __future__ import annotations

import pytest
import torch

from horovod_lm.jupyter import plots

WORDS = ["hill", "farm", "beach"]
WAYS = {"as learned": [0.5, 0.3, 0.2], "top-k 1": torch.tensor([1.0, 0.0, 0.0])}


def test_next_words_draws_each_way_with_the_first_word_on_top():
    left, right = plots.plot_next_words(WORDS, WAYS).axes
    assert [bar.get_width() for bar in left.patches] == [0.5, 0.3, 0.2]
    assert [bar.get_width() for bar in right.patches] == [1.0, 0.0, 0.0]
    assert [label.get_text() for label in left.get_yticklabels()] == WORDS
    assert left.yaxis_inverted() and right.get_xlim() == left.get_xlim()
    assert left.patches[0].get_hatch() != right.patches[0].get_hatch()


@pytest.mark.parametrize("count", [0, 6])
def test_more_ways_than_styles_are_refused(count):
    with pytest.raises(ValueError, match="1 to 5 ways"):
        plots.plot_next_words(["a"], {str(number): [1.0] for number in range(count)})


def test_attention_of_many_words_has_a_scale_instead_of_numbers():
    [few] = plots.plot_attention(torch.eye(3), WORDS, "few").axes
    many, scale = plots.plot_attention(torch.eye(18), WORDS * 6, "many").axes
    assert len(few.texts) == 9 and not many.texts
    assert scale.get_ylabel() == "weight" and scale.get_ylim() == (0, 1)
    [image] = many.images
    red, green, blue, _ = image.cmap(0.5)
    assert max(red, green, blue) - min(red, green, blue) < 0.01
    assert [label.get_text() for label in many.get_xticklabels()] == WORDS * 6


def test_cost_by_length_draws_every_way_from_zero():
    times = {"with a cache": [1.0, 1.1], "without": [1.0, 5.0]}
    [axes] = plots.plot_cost_by_length([10, 500], times).axes
    first, second = axes.lines
    assert list(first.get_ydata()) == [1.0, 1.1] and list(second.get_xdata()) == [10, 500]
    assert first.get_linestyle() != second.get_linestyle()
    assert axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(times)


def every_plot() -> list[plots.Plot]:
    return [
        plots.plot_next_words(WORDS, WAYS),
        plots.plot_cost_by_length([1, 2], {"so": [1.0, 2.0]}),
    ]


def test_every_figure_has_a_title_and_axes_with_units():
    bars, cost = every_plot()
    assert all(plot.axes[0].get_title() for plot in (bars, cost))
    assert bars.axes[0].get_xlabel() == "probability"
    assert "tokens" in cost.axes[0].get_xlabel() and "milliseconds" in cost.axes[0].get_ylabel()


def test_a_figure_shows_itself_the_same_at_every_execution():
    for first, second in zip(every_plot(), every_plot(), strict=True):
        assert repr(first) == repr(second) and " at 0x" not in repr(first)
        assert first.png() == second.png()
