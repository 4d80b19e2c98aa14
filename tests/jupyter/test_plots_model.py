"""Figures of the model show the numbers they are given, and can be read without colours."""

from __future__ import annotations

import pytest
import torch

from horovod_lm.jupyter import plots

WORDS = ["Lily", "has", "a"]
SUMS = {"weights": {"table": 30.0, "layers": 50.0}, "arithmetic": {"layers": 60.0, "looks": 5.0}}
STREAMS = {"scaled": [0.1, 0.2, 0.25], "not scaled": [0.1, 0.4, 0.6]}
INFLUENCES = {"causal": torch.tril(torch.ones(3, 3)), "open": torch.full((3, 3), 4.0)}


def test_pieces_lie_end_to_end_and_the_first_sum_stands_on_top():
    [axes] = plots.plot_pieces(SUMS, "Made of", "share (%)").axes
    tables, layers, looks = axes.containers
    assert [bar.get_width() for bar in tables] == [30.0, 0.0]
    assert [(bar.get_x(), bar.get_width()) for bar in layers] == [(30.0, 50.0), (0.0, 60.0)]
    assert [(bar.get_x(), bar.get_width()) for bar in looks] == [(80.0, 0.0), (60.0, 5.0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SUMS)
    assert axes.yaxis_inverted()
    styles = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers]
    assert len({hatch for _, hatch in styles}) == len(styles)


@pytest.mark.parametrize("count", [0, 6])
def test_more_pieces_than_styles_are_refused(count):
    with pytest.raises(ValueError, match="1 to 5 pieces"):
        plots.plot_pieces({"sum": {str(number): 1.0 for number in range(count)}}, "", "")


def test_depth_begins_before_the_first_block():
    [axes] = plots.plot_depth(STREAMS, "Growth").axes
    scaled, unscaled = axes.lines
    assert list(scaled.get_xdata()) == [0, 1, 2] and list(scaled.get_ydata()) == [0.1, 0.2, 0.25]
    assert scaled.get_linestyle() != unscaled.get_linestyle()
    assert scaled.get_marker() != unscaled.get_marker()
    assert axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(STREAMS)


@pytest.mark.parametrize("count", [0, 5])
def test_more_models_than_styles_are_refused(count):
    with pytest.raises(ValueError, match="1 to 4 models"):
        plots.plot_depth({str(number): [1.0] for number in range(count)}, "")


def test_influence_is_drawn_as_shares_of_each_rows_largest():
    causal, open_to_all, scale = plots.plot_influence(INFLUENCES, WORDS, "Who matters").axes
    assert causal.images[0].get_array().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert open_to_all.images[0].get_array().min() == 1
    assert [axes.get_title() for axes in (causal, open_to_all)] == list(INFLUENCES)
    assert [label.get_text() for label in causal.get_yticklabels()] == WORDS
    assert "share" in scale.get_ylabel()


def every_plot() -> list[plots.Plot]:
    return [
        plots.plot_pieces(SUMS, "Made of", "share (%)"),
        plots.plot_depth(STREAMS, "Growth"),
        plots.plot_influence(INFLUENCES, WORDS, "Who matters"),
    ]


def test_every_figure_has_a_title_and_axes_with_names():
    for plot in every_plot():
        assert plot.axes[0].get_title() and plot.axes[0].get_xlabel()


def test_a_figure_shows_itself_the_same_at_every_execution():
    for first, second in zip(every_plot(), every_plot(), strict=True):
        assert repr(first) == repr(second) and " at 0x" not in repr(first)
        assert first.png() == second.png()
