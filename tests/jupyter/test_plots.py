"""Figures show the numbers they are given, have titles and units, and are readable in greyscale."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_rgb

from horovod_lm.analysis.ring import ring_allreduce
from horovod_lm.analysis.scaling import GBIT, Job, Measurement, Network, breaking_point, step
from horovod_lm.analysis.timeline import Span
from horovod_lm.jupyter import plots
from horovod_lm.jupyter.plots import BAR_STYLES, LINE_STYLES, RANK_SHADES, name_of_sum
from horovod_lm.training.metrics import PARTS_OF_A_STEP


def training_rows(steps: int = 12, slower: float = 1.0) -> list[dict]:
    """Rows as a run of so many steps leaves them; the number of ranks changes after step 2."""
    rows = []
    for number in range(1, steps + 1):
        parts = {part: slower * (index + 1) / 1000 for index, part in enumerate(PARTS_OF_A_STEP)}
        rows.append({"phase": "train", "step": number, "loss": 7 / number,
                     "learning_rate": number * 1e-4, "tokens_per_second": 5000 + number,
                     "world_size": 2 if number <= 2 else 1, **parts})  # fmt: skip
        if number % 4 == 0:
            rows.append({"phase": "validation", "step": number, "loss": 7.5 / number})
    return rows


RUN = {"run": training_rows()}
WORDS = ["the", "cat", "sat"]
SHARDS = {"forgotten": [[0, 1, 2, 3], [0, 1, 2, 3]], "remembered": [[0, 1, 2, 3], [3, 0, 2, 1]]}
WHOLE = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
RESUMED = {"all of it": [4.0, 3.0, 2.0], "without the moments": [4.0, 3.5, 2.5]}
LINK = Network(latency=0.001, bandwidth=1e6)
MESSAGES = [Measurement(size, 2, LINK.allreduce_seconds(size, 2) * 1.1) for size in (8000, 1000)]
SPANS = [
    Span("late", "NEGOTIATE_ALLREDUCE", 5.001, 5.002),
    Span("early", "NEGOTIATE_ALLREDUCE", 5.000, 5.002),
    Span("early", "ALLREDUCE", 5.003, 5.010),
    Span("early", "MEMCPY_IN_FUSION_BUFFER", 5.004, 5.005),
    Span("early", "GLOO_ALLREDUCE", 5.005, 5.009),
    Span("late", "ALLREDUCE", 5.006, 5.010),
    Span("unfinished", "NEGOTIATE_ALLREDUCE", 5.0, 5.1),
]
JOB, NETWORK = Job(124e6, 0.4, overlap=0.8), Network(2e-5, 10 * GBIT)


def lines(**options) -> plots.Plot:
    y = {"1 rank": [2.0, 4.0, 9.0], "2 ranks": [1.0, 2.0, 4.0]}
    return plots.plot_lines([1, 2, 4], y, "Time", "batch (samples)", "time (seconds)", **options)


def bars(layout: str) -> plots.Plot:
    series = {"weights": [30.0, 0.0], "layers": torch.tensor([50.0, 60.0])}
    return plots.plot_bars(["first", "second"], series, "Made of", "share (%)", layout=layout)


def ring(workers: int) -> plots.Plot:
    data = [torch.arange(12.0) + worker for worker in range(workers)]
    return plots.plot_ring_steps(ring_allreduce(data))


def scaling(job: Job = JOB, network: Network = NETWORK, workers: int = 48) -> plots.Plot:
    return plots.plot_scaling(job, network, workers, 8, inside=None, threshold=0.9)


# Each figure, and the units that its axes must name.
FIGURES: dict[str, tuple[Callable[[], plots.Plot], tuple[str, ...]]] = {
    "lines": (lines, ("samples", "seconds")),
    "bars": (lambda: bars("grouped"), ("%",)),
    "stacked": (lambda: bars("stacked"), ("%",)),
    "panels": (lambda: bars("panels"), ("%",)),
    "loss": (lambda: plots.plot_loss(RUN), ("optimizer step", "nats per token")),
    "metrics": (lambda: plots.plot_metrics(RUN, "Speed"), ("tokens per second",)),
    "parts": (lambda: plots.plot_step_parts(RUN), ("milliseconds",)),
    "summary": (lambda: plots.plot_summary(RUN["run"], "a", "b", "t"), ("nats per token",)),
    "resumed": (lambda: plots.plot_resumed_runs(WHOLE, RESUMED, "Resumed"), ("nats per token",)),
    "world size": (lambda: plots.plot_world_size(RUN["run"], "Elastic"), ("ranks",)),
    "attention": (lambda: plots.plot_attention(torch.eye(3), WORDS, "Where"), ("query", "key")),
    "heads": (lambda: plots.plot_all_heads(torch.rand(2, 3, 5, 5), torch.ones(2, 3), "H"), ()),
    "shards": (lambda: plots.plot_shards(SHARDS, "Shards"), ("sample", "epoch")),
    "ring": (lambda: ring(3), ()),
    "timeline": (lambda: plots.plot_timeline(SPANS), ("milliseconds", "gradient")),
    "allreduces": (
        lambda: plots.plot_allreduces({"here": MESSAGES}, {"here": LINK}), ("bytes", "seconds")
    ),
    "scaling": (scaling, ("seconds", "workers", "bytes", "%")),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_a_title_and_units_and_is_the_same_at_every_execution(name):
    draw, units = FIGURES[name]
    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(0)
    second = draw()
    assert first.get_suptitle() or first.axes[0].get_title()
    labels = " ".join(axes.get_xlabel() + " " + axes.get_ylabel() for axes in first.axes)
    assert all(unit in labels for unit in units)
    assert repr(first) == repr(second) and repr(first).startswith("figure: ")
    assert " at 0x" not in repr(first) and "\n" not in repr(first)
    assert first._repr_png_() == second._repr_png_()
    assert first._repr_png_().startswith(b"\x89PNG")


def texts_of(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_styles_differ_without_colours():
    def lightness(colour: str) -> float:
        red, green, blue = to_rgb(colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert len({(line, marker) for _, line, _, marker in LINE_STYLES}) == len(LINE_STYLES)
    widths = [width for _, _, width, _ in LINE_STYLES]
    assert widths[0] > widths[1] >= widths[2]  # lines that coincide can all be seen
    for (colour, hatch), (following, next_hatch) in pairwise(BAR_STYLES):
        assert hatch != next_hatch and abs(lightness(colour) - lightness(following)) > 0.05
    assert all(lightness(a) - lightness(b) > 0.1 for a, b in pairwise(RANK_SHADES))


def test_lines_hold_their_values_on_the_axes_that_were_asked_for():
    [axes] = lines().axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[2, 4, 9], [1, 2, 4]]
    assert axes.get_ylim()[0] == 0 and texts_of(axes.get_legend()) == ["1 rank", "2 ranks"]
    [axes] = lines(log_x=True, log_y=True, marks={"smallest": 2.5}).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.lines[2].get_label() == "smallest" and set(axes.lines[2].get_xdata()) == {2.5}


def test_bars_lie_below_each_other_or_end_to_end_or_in_panels():
    [axes] = bars("grouped").axes
    assert [bar.get_width() for bar in axes.patches] == [30, 0, 50, 60]
    assert [text.get_text() for text in axes.texts] == ["30", "0", "50", "60"]
    assert len({round(bar.get_y(), 3) for bar in axes.patches}) == 4
    [axes] = bars("stacked").axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches[2:]] == [(30, 50), (0, 60)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    left, right = bars("panels").axes
    assert [bar.get_width() for bar in right.patches] == [50, 60]
    assert left.get_xlim() == right.get_xlim() and right.get_title() == "layers"
    levels = {"entropy": 41.2}
    [axes] = plots.plot_bars(["a"], {"loss": [60.0]}, "", "", levels=levels).axes
    assert set(axes.lines[0].get_xdata()) == {41.2}


def test_loss_shows_both_phases_of_every_run_and_the_levels():
    runs = {"1 rank": training_rows(), "2 ranks": training_rows()}
    [axes] = plots.plot_loss(runs, levels={"a guess": 7.62, "entropy": 0.5}).axes
    found = {line.get_label(): line for line in axes.lines}
    assert list(found) == ["training, 1 rank", "validation, 1 rank", "training, 2 ranks",
                           "validation, 2 ranks", "a guess", "entropy"]  # fmt: skip
    assert list(found["training, 2 ranks"].get_xdata()) == list(range(1, 13))
    assert list(found["validation, 1 rank"].get_ydata()) == [7.5 / 4, 7.5 / 8, 7.5 / 12]
    assert set(found["a guess"].get_ydata()) == {7.62}
    assert all(tick == int(tick) for tick in axes.get_xticks())
    only_training = [row for row in RUN["run"] if row["phase"] == "train"]
    [axes] = plots.plot_loss({"run": only_training}).axes
    assert texts_of(axes.get_legend()) == ["training"]


def test_many_steps_are_drawn_faintly_under_their_running_median():
    rows = training_rows(180)
    rows[90]["loss"] = 1000.0  # visible, but without influence on the median
    [axes] = plots.plot_loss({"long": rows}).axes
    raw, smooth, _ = axes.lines
    assert max(raw.get_ydata()) == 1000 and raw.get_alpha() < 0.5
    assert smooth.get_label() == "training (median of 7 steps)"
    assert len(smooth.get_ydata()) == 180 and max(smooth.get_ydata()) < 8
    raw, smooth, _ = plots.plot_loss({"longer": training_rows(100_000)}).axes[0].lines
    assert len(raw.get_xdata()) == 100_000 and 500 < len(smooth.get_xdata()) < 700


def test_metrics_have_a_panel_for_each_column():
    columns = ["loss", "learning_rate", "tokens_per_second"]
    rows = [row for row in RUN["run"] if row["phase"] == "train"]
    panels = plots.plot_metrics(RUN, "run", columns).axes
    for axes, column in zip(panels, columns, strict=True):
        assert list(axes.lines[0].get_ydata()) == [row[column] for row in rows]


@pytest.mark.parametrize("draw", [plots.plot_loss, plots.plot_step_parts])
def test_a_run_without_steps_is_drawn(draw):
    assert draw({"killed early": []}).png() and plots.plot_world_size([], "").png()


def test_step_parts_are_stacked_medians():
    disturbed = training_rows(slower=2)
    disturbed[0] = {**disturbed[0], "seconds_forward": 60.0}
    [axes] = plots.plot_step_parts({"1 rank": training_rows(), "2 ranks": disturbed}).axes
    assert [part.get_label().split()[0] for part in axes.containers] == [
        part.removeprefix("seconds_") for part in PARTS_OF_A_STEP
    ]
    for run, whole in enumerate((1 + 2 + 3 + 4 + 5, 2 + 4 + 6 + 8 + 10)):
        last = axes.containers[-1][run]
        assert last.get_x() + last.get_width() == pytest.approx(whole)
    assert "4 / 8 ms" in axes.containers[3].get_label()


def test_summary_shows_the_prompt_and_its_continuation_once_each():
    plot = plots.plot_summary(RUN["run"], "def f(\n  a", ", b):\n    $return$ x", "It talks")
    bold, plain = (text.get_text().split("\n") for text in plot.axes[1].texts)
    assert bold[:2] == ["def f(", "  a"] and not any(bold[2:])
    assert [line.strip() for line in plain] == ["", ", b):", "$return$ x"]
    assert plain[1].index(",") == len("  a")
    plot.png()  # dollars are letters here, not mathematics


def test_resumed_runs_are_drawn_over_the_end_of_the_whole_run():
    plot = plots.plot_resumed_runs(WHOLE, RESUMED, "Resumed")
    assert [axes.get_title() for axes in plot.axes] == list(RESUMED)
    for axes, losses in zip(plot.axes, RESUMED.values(), strict=True):
        whole, resumed, resumed_at = axes.lines
        assert list(whole.get_ydata()) == WHOLE and list(whole.get_xdata()) == [1, 2, 3, 4, 5, 6]
        assert list(resumed.get_ydata()) == losses and list(resumed.get_xdata()) == [4, 5, 6]
        assert set(resumed_at.get_xdata()) == {3.5}
    panels = plots.plot_resumed_runs([1.0] * 100, {"late": [1.0] * 40}, "").axes
    assert panels[0].lines[0].get_xdata()[0] == 55  # shortly before it was resumed


def test_world_size_is_drawn_under_the_loss_and_each_change_is_marked():
    loss, ranks = plots.plot_world_size(RUN["run"], "Elastic").axes
    assert list(ranks.lines[0].get_ydata()) == [2, 2] + [1] * 10
    for axes in (loss, ranks):
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert marks == [2.5]
    assert ranks.get_ylim()[0] == 0 and loss.get_xlim() == ranks.get_xlim()


def test_attention_has_a_number_in_each_cell_or_a_colour_bar():
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    [axes] = plots.plot_attention(weights, ["the", "cat"], "Where").axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "1.00", (1, 0): "0.00", (0, 1): "0.25", (1, 1): "0.75"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["the", "cat"]
    maps = {"causal": torch.eye(18).tril(), "open": torch.ones(18, 18)}
    causal, opened, scale = plots.plot_attention(maps, WORDS * 6, "Many", label="share").axes
    assert not causal.texts and scale.get_ylabel() == "share" and scale.get_ylim() == (0, 1)
    assert opened.get_title() == "open" and opened.images[0].get_array().min() == 1
    assert [label.get_text() for label in causal.get_xticklabels()] == WORDS * 6


def test_maps_of_heads_fill_the_page_and_are_never_too_small_to_see():
    for n_layers, n_heads, inches in ((1, 4, 8.0), (2, 12, 15.6)):
        weights = torch.eye(5).expand(n_layers, n_heads, 5, 5)
        plot = plots.plot_all_heads(weights, torch.zeros(n_layers, n_heads), "Heads")
        assert plot.get_figwidth() == pytest.approx(inches) and plot.png()
        assert all(axes.get_window_extent().width / plot.dpi > 1.1 for axes in plot.axes)


def test_shards_have_each_samples_rank_in_its_cell():
    for axes, rows in zip(plots.plot_shards(SHARDS, "").axes, SHARDS.values(), strict=True):
        assert [text.get_text() for text in axes.texts] == [str(r) for row in rows for r in row]
        assert axes.images[0].get_array().tolist() == rows and axes.yaxis_inverted()


def test_a_sum_is_named_in_the_order_in_which_it_grew():
    assert name_of_sum(frozenset({2}), 2, 4) == "2"
    assert name_of_sum(frozenset({0, 1, 3}), 3, 4) == "3+0+1"
    assert name_of_sum(frozenset(range(4)), 3, 4) == "all"
    assert name_of_sum(frozenset(range(4)), 0, 8) == "4 of 8"


@pytest.mark.parametrize("workers", [2, 8])
def test_each_ring_step_has_a_panel_with_the_sum_in_every_cell(workers):
    states = ring_allreduce([torch.arange(12.0)] * workers)
    shown = [axes for axes in ring(workers).axes if axes.get_visible()]
    for axes, state in zip(shown, states, strict=True):
        assert [text.get_text() for text in axes.texts] == [
            name_of_sum(contributors, chunk, workers)
            for row in state.holds
            for chunk, contributors in enumerate(row)
        ]
        frames = {(round(one.get_x() + 0.46), round(one.get_y() + 0.46)) for one in axes.patches}
        assert frames == {(one.chunk, one.receiver) for one in state.messages}
        [image] = axes.images
        greys = [sum(image.cmap(image.norm(count / 4))[:3]) / 3 for count in range(1, 5)]
        assert greys == sorted(greys, reverse=True) and greys[-1] > 0.5  # its text is readable


def test_a_timeline_has_a_row_for_each_tensor_that_was_reduced():
    plot = plots.plot_timeline(SPANS)
    [axes] = plot.axes
    found = sorted((round(bar.get_y() + 0.45), round(bar.get_x(), 6), round(bar.get_width(), 6))
                   for bar in axes.patches)  # fmt: skip
    assert found == [(0, 0, 2), (0, 3, 7), (0, 4, 1), (0, 5, 4), (1, 1, 1), (1, 6, 4)]
    assert axes.yaxis_inverted()
    assert len(set(texts_of(plot.legends[0]))) == 4


def test_measured_allreduces_are_points_and_the_model_is_a_line():
    [axes] = plots.plot_allreduces({"here": MESSAGES}, {"here": LINK}).axes
    line, points = axes.lines
    sizes, modelled = line.get_data()
    assert list(points.get_xdata()) == [8000, 1000]
    assert (sizes[0], sizes[-1]) == pytest.approx((1000, 8000)) and len(sizes) > 20
    assert modelled == pytest.approx([LINK.allreduce_seconds(size, 2) for size in sizes])
    assert list(points.get_ydata()) == pytest.approx([0.011, 0.0033])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def points_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in axes.lines}


def test_scaling_shows_what_the_model_predicts_beside_what_was_measured():
    times, efficiency, links = map(points_of, scaling().axes)
    for workers, seconds in times["step"]:
        assert seconds == step(JOB, NETWORK, workers, 8).seconds
    for workers, seconds in times["allreduce"]:
        assert workers <= 8 or seconds == step(JOB, NETWORK, workers, 8).communication
    assert {8, 9, 48, 1024} <= {workers for workers, _ in times["step"]}  # a second node at 9
    chosen = step(JOB, NETWORK, 48, 8).efficiency
    assert efficiency[f"chosen: {chosen:.0%}"] == [(48, chosen)]
    found = breaking_point(JOB, NETWORK, 8)
    assert [x for x, _ in efficiency[f"below it from {found:,} workers on"]] == [found, found]
    for size, seconds in links["6 nodes"]:
        assert seconds == NETWORK.allreduce_seconds(size, 6)


def test_one_node_has_no_link_to_draw():
    links = scaling(workers=8).axes[2]
    assert not links.lines and "nothing crosses the network" in links.texts[0].get_text()


def test_the_axis_of_time_names_seconds_and_no_powers_of_ten():
    plot = scaling(Job(124e6, 0.052))
    plot.canvas.draw()
    for axes in (plot.axes[0], plot.axes[2]):
        bottom, top = axes.get_ylim()
        ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        names = [tick.label1.get_text() for tick in ticks if bottom <= tick.get_loc() <= top]
        assert len([name for name in names if name]) >= 2
        assert all(name.endswith("s") and "times" not in name for name in names if name)
