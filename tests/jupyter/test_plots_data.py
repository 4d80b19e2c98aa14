"""Figures of data show the numbers they are given, and can be read without colours."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_rgb

from horovod_lm.jupyter import plots
from horovod_lm.jupyter.plots.data import RANK_SHADES

SAVED = {"stories": [1.0, 0.5, 0.25], "German": [1.1, 1.0, 0.9]}
SHARDS = {"forgotten": [[0, 1, 2, 3], [0, 1, 2, 3]], "remembered": [[0, 1, 2, 3], [3, 0, 2, 1]]}


def test_tokens_per_character_draws_every_text_from_zero():
    [axes] = plots.plot_tokens_per_character([0, 10, 100], SAVED).axes
    stories, german = axes.lines
    assert list(stories.get_xdata()) == [0, 10, 100] and list(german.get_ydata()) == [1.1, 1.0, 0.9]
    assert stories.get_linestyle() != german.get_linestyle()
    assert axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(SAVED)


@pytest.mark.parametrize("count", [0, 5])
def test_more_texts_than_styles_are_refused(count):
    with pytest.raises(ValueError, match="1 to 4 texts"):
        plots.plot_tokens_per_character([0], {str(number): [1.0] for number in range(count)})


def test_losses_stand_above_a_line_at_the_entropy():
    [axes] = plots.plot_losses_above_floor({"knows nothing": 500.0, "two words": 60.0}, 41.2).axes
    assert [bar.get_width() for bar in axes.patches] == [500.0, 60.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["knows nothing", "two words"]
    [line] = axes.lines
    assert set(line.get_xdata()) == {41.2} and line.get_linestyle() == "--"
    assert axes.yaxis_inverted() and axes.get_xlim()[0] == 0


def test_shards_write_each_samples_rank_into_its_cell():
    forgotten, remembered = plots.plot_shards(SHARDS, "Who sees what").axes
    for axes, rows in ((forgotten, SHARDS["forgotten"]), (remembered, SHARDS["remembered"])):
        assert [text.get_text() for text in axes.texts] == [str(r) for row in rows for r in row]
        [mesh] = axes.collections
        assert mesh.get_array().tolist() == rows
        assert axes.yaxis_inverted()
    places = [text.get_position() for text in remembered.texts]
    assert places == [(sample + 0.5, epoch + 0.5) for epoch in (0, 1) for sample in range(4)]


def test_the_shades_of_ranks_differ_without_colours():
    greys = [
        0.3 * red + 0.59 * green + 0.11 * blue for red, green, blue in map(to_rgb, RANK_SHADES)
    ]
    assert all(above - below > 0.1 for above, below in zip(greys, greys[1:], strict=False))


def test_more_ranks_than_shades_are_refused():
    with pytest.raises(ValueError, match="ranks 0 to 3, not 4"):
        plots.plot_shards({"too many": [[0, 4]]}, "Who sees what")


def every_plot() -> list[plots.Plot]:
    return [
        plots.plot_tokens_per_character([0, 10, 100], SAVED),
        plots.plot_losses_above_floor({"knows nothing": 500.0}, 41.2),
        plots.plot_shards(SHARDS, "Who sees what"),
    ]


def test_every_figure_has_a_title_and_axes_with_units():
    saved, losses, shards = every_plot()
    for axes in (saved.axes[0], losses.axes[0], *shards.axes):
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
    assert saved.axes[0].get_ylabel() == "tokens per character"
    assert "nats" in losses.axes[0].get_xlabel()


def test_a_figure_shows_itself_the_same_at_every_execution():
    for first, second in zip(every_plot(), every_plot(), strict=True):
        assert repr(first) == repr(second) and " at 0x" not in repr(first)
        assert first.png() == second.png()
