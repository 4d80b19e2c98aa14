"""Figures of several hosts show the numbers they are given, and can be read without colours."""

from __future__ import annotations

import pytest

from horovod_lm.jupyter import plots


def row(rate: float, size: int, seconds: float) -> dict[str, float]:
    formula = size * 8 / (rate * 1e6)
    return {"megabits_per_second": rate, "bytes": size, "seconds": seconds,
            "formula_seconds": formula}  # fmt: skip


ROWS = [row(20, 1000, 0.001), row(20, 2000, 0.002), row(400, 1000, 0.0005)]


def test_each_link_has_its_measured_points_and_the_formulas_line():
    [axes] = plots.plot_allreduce_over_links(ROWS).axes
    formula, measured, *fast = axes.lines
    assert list(measured.get_xdata()) == [1000, 2000] and list(measured.get_ydata()) == [1e-3, 2e-3]
    assert list(formula.get_ydata()) == [4e-4, 8e-4]
    assert measured.get_linestyle() == "None" and formula.get_marker() in ("", "None", None)
    assert measured.get_marker() != fast[1].get_marker()
    assert formula.get_linestyle() != fast[0].get_linestyle()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "20 Mbit/s",
        "400 Mbit/s",
    ]


def test_it_has_a_title_and_axes_with_units():
    [axes] = plots.plot_allreduce_over_links(ROWS, "Links").axes
    assert axes.get_title() == "Links"
    assert "bytes" in axes.get_xlabel() and "seconds" in axes.get_ylabel()
    assert axes.get_xscale() == axes.get_yscale() == "log"


@pytest.mark.parametrize("rates", [0, 5])
def test_no_link_and_more_links_than_styles_are_refused(rates):
    with pytest.raises(ValueError, match="1 to 4 rates"):
        plots.plot_allreduce_over_links([row(rate, 1, 1) for rate in range(1, rates + 1)])


def test_it_shows_itself_the_same_at_every_execution():
    first, second = (plots.plot_allreduce_over_links(ROWS) for _ in range(2))
    assert repr(first) == repr(second) and " at 0x" not in repr(first)
    assert first.png() == second.png()
