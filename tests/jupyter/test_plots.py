"""Figures show what the rows hold, say what they show, and can be read without colours."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from matplotlib.colors import to_rgb

from horovod_lm.jupyter import plots
from horovod_lm.utils.metrics import COLUMNS, PARTS_OF_A_STEP, MetricsRecorder, read_metrics


def training_rows(steps: int = 12, slower: float = 1.0) -> list[dict]:
    """Rows as a run of so many steps leaves them."""
    rows = []
    for step in range(1, steps + 1):
        parts = {part: slower * (index + 1) / 1000 for index, part in enumerate(PARTS_OF_A_STEP)}
        rows.append({"phase": "train", "step": step, "loss": 7 / step, "learning_rate": step * 1e-4,
                     "tokens_per_second": 5000 + step, **parts})  # fmt: skip
        if step % 4 == 0:
            rows.append({"phase": "validation", "step": step, "loss": 7.5 / step})
    return rows


def test_loss_draws_both_phases_of_every_run_and_the_levels():
    plot = plots.plot_loss(
        {"1 rank": training_rows(), "2 ranks": training_rows()}, "Same", {"a guess": 7.62}
    )
    [axes] = plot.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["training, 1 rank", "validation, 1 rank", "training, 2 ranks",
                           "validation, 2 ranks", "a guess"]  # fmt: skip
    assert list(lines["training, 2 ranks"].get_xdata()) == list(range(1, 13))
    assert list(lines["validation, 1 rank"].get_xdata()) == [4, 8, 12]
    assert list(lines["validation, 1 rank"].get_ydata()) == [7.5 / 4, 7.5 / 8, 7.5 / 12]
    assert set(lines["a guess"].get_ydata()) == {7.62}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)


def test_two_levels_can_be_told_apart():
    levels = {"at the start": 7.0, "at the end": 0.5}
    [axes] = plots.plot_loss({"run": training_rows()}, levels=levels).axes
    upper, lower = (line for line in axes.lines if line.get_label() in levels)
    assert upper._unscaled_dash_pattern != lower._unscaled_dash_pattern


def test_a_run_without_validation_has_no_empty_entry_in_the_legend():
    rows = [row for row in training_rows() if row["phase"] == "train"]
    [axes] = plots.plot_loss({"only": rows}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training"]


def test_many_steps_are_drawn_faintly_under_their_running_median():
    rows = training_rows(180)
    rows[90]["loss"] = 1000.0  # one wild step must be seen, and must not bend the line
    [axes] = plots.plot_loss({"long": rows}).axes
    raw, smooth, _ = axes.lines
    assert max(raw.get_ydata()) == 1000 and raw.get_alpha() < 0.5
    assert smooth.get_label() == "training (median of 7 steps)"
    assert len(smooth.get_ydata()) == 180 and max(smooth.get_ydata()) < 8
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "training (median of 7 steps)", "validation"
    ]  # fmt: skip


def test_steps_are_whole_numbers_on_the_axis():
    [axes] = plots.plot_loss({"short": training_rows(5)}).axes
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_runs_that_lie_over_each_other_can_all_be_seen():
    plot = plots.plot_loss({name: training_rows() for name in "abcd"})
    lines = [line for line in plot.axes[0].lines if line.get_label().startswith("training")]
    styles = [line.get_linestyle() for line in lines]
    assert len(set(styles)) == 4 and styles[0] == "-"
    widths = [line.get_linewidth() for line in lines]
    assert widths[0] > widths[1] >= widths[2]
    markers = [line.get_marker() for line in plot.axes[0].lines if line not in lines]
    assert len(set(markers)) == 4


@pytest.mark.parametrize("count", [0, 5])
def test_more_runs_than_styles_are_refused(count):
    with pytest.raises(ValueError, match="1 to 4 runs"):
        plots.plot_loss({str(number): training_rows() for number in range(count)})


def test_step_parts_are_stacked_to_the_length_of_a_step():
    rows = {"1 rank": training_rows(), "2 ranks": training_rows(slower=2)}
    [axes] = plots.plot_step_parts(rows).axes
    assert [bars.get_label().split()[0] for bars in axes.containers] == [
        part.removeprefix("seconds_") for part in PARTS_OF_A_STEP
    ]
    for run, whole in enumerate((1 + 2 + 3 + 4 + 5, 2 + 4 + 6 + 8 + 10)):
        bars = [container[run] for container in axes.containers]
        for bar, following in zip(bars, bars[1:], strict=False):
            assert bar.get_x() + bar.get_width() == pytest.approx(following.get_x())
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(whole)
    assert "4 / 8 ms" in axes.containers[3].get_label()


def test_one_disturbed_step_does_not_change_the_bars():
    rows = training_rows()
    disturbed = [{**rows[0], "seconds_forward": 60.0}, *rows[1:]]
    [calm], [after] = (plots.plot_step_parts({"run": each}).axes for each in (rows, disturbed))
    assert calm.containers[1][0].get_width() == after.containers[1][0].get_width()


def test_speed_draws_the_rate_and_the_tokens_per_second_from_zero():
    left, right = plots.plot_speed({"run": training_rows()}).axes
    assert list(left.lines[0].get_ydata()) == [step * 1e-4 for step in range(1, 13)]
    assert list(right.lines[0].get_ydata()) == [5000 + step for step in range(1, 13)]
    assert right.get_ylim()[0] == 0


def test_learning_rates_of_all_runs_share_one_panel():
    runs = {"kept": training_rows(), "doubled": training_rows(20)}
    plot = plots.plot_learning_rate(runs, "Warm-up")
    [axes] = plot.axes
    assert [line.get_label() for line in axes.lines] == list(runs)
    assert list(axes.lines[1].get_ydata()) == [step * 1e-4 for step in range(1, 21)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(runs)
    assert repr(plot) == "figure: Warm-up: learning rate over the steps of kept and doubled"


def test_progress_draws_the_loss_over_its_floor_and_the_rate_and_the_speed():
    plot = plots.plot_progress(training_rows(), "first", entropy=0.5)
    loss, rate, speed = plot.axes
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines) == ["training", "validation", "exact entropy of the stories"]
    assert list(lines["training"].get_ydata()) == [7 / step for step in range(1, 13)]
    assert set(lines["exact entropy of the stories"].get_ydata()) == {0.5}
    assert list(rate.lines[0].get_ydata()) == [step * 1e-4 for step in range(1, 13)]
    assert list(speed.lines[0].get_ydata()) == [5000 + step for step in range(1, 13)]
    assert repr(plot) == "figure: loss, learning rate and speed of first"


def test_progress_of_a_corpus_of_unknown_entropy_has_no_floor():
    loss = plots.plot_progress(training_rows(), "first").axes[0]
    assert [line.get_label() for line in loss.lines] == ["training", "validation"]


def test_a_long_run_is_drawn_in_a_moment():
    rows = training_rows(100_000)
    started = time.perf_counter()
    plot = plots.plot_progress(rows, "long")
    plot.png()
    assert time.perf_counter() - started < 15  # a median at every step takes a minute
    raw, smooth, _ = plot.axes[0].lines
    assert len(raw.get_xdata()) == 100_000 and 500 < len(smooth.get_xdata()) < 700


def test_summary_shows_the_prompt_and_its_continuation_once_each():
    plot = plots.plot_summary(training_rows(), "def f(\n  a", ", b):\n    $return$ x", "It talks")
    bold, plain = (text.get_text().split("\n") for text in plot.axes[1].texts)
    assert bold[:2] == ["def f(", "  a"] and not any(bold[2:])
    assert [line.strip() for line in plain] == ["", ", b):", "$return$ x"]
    assert plain[1].index(",") == len("  a")
    plot.png()  # dollars are letters here, not mathematics


def test_summary_marks_a_line_that_it_cuts_off():
    [_, axes] = plots.plot_summary(training_rows(), "a", "b" * 100 + "\nc", "It talks").axes
    cut, whole = axes.texts[1].get_text().split("\n")
    assert cut.endswith("b…") and len(cut) < 70 and whole == "c"


def every_plot() -> list[plots.Plot]:
    runs = {"run": training_rows()}
    return [plots.plot_loss(runs), plots.plot_speed(runs), plots.plot_step_parts(runs),
            plots.plot_summary(runs["run"], "a", "b", "t"),
            plots.plot_progress(runs["run"], "run")]  # fmt: skip


def test_every_figure_has_a_title_and_axes_with_units():
    for plot in every_plot():
        assert plot.axes[0].get_title() or plot.get_suptitle()
        for axes in plot.axes:
            if axes.get_xticks().size:
                assert axes.get_xlabel()
    loss, rate_and_speed, parts, *_ = every_plot()
    assert "nats per token" in loss.axes[0].get_ylabel()
    assert "tokens per second" in rate_and_speed.axes[1].get_ylabel()
    assert "milliseconds" in parts.axes[0].get_xlabel()


def test_a_figure_shows_itself_the_same_at_every_execution():
    for first, second in zip(every_plot(), every_plot(), strict=True):
        assert repr(first) == repr(second) and " at 0x" not in repr(first)
        assert first._repr_png_() == second._repr_png_()
        assert first._repr_png_().startswith(b"\x89PNG")


def test_save_makes_the_folder_and_writes_the_picture(tmp_path):
    plot = plots.plot_loss({"run": training_rows()})
    assert plot.save(tmp_path / "new" / "loss.png").read_bytes() == plot.png()


def test_the_colours_differ_in_lightness_where_styles_do_not_help():
    def lightness(colour: str) -> float:
        red, green, blue = to_rgb(colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    parts = [(lightness(colour), hatch) for colour, hatch in plots.PART_STYLES]
    for (light, hatch), (next_light, next_hatch) in zip(parts, parts[1:], strict=False):
        assert hatch != next_hatch and abs(light - next_light) > 0.05


def test_rows_of_a_real_recorder_can_be_drawn(tmp_path):
    recorder = MetricsRecorder(tmp_path, tmp_path / "logs", tmp_path / "events")
    for row in training_rows():
        recorder.record(**{key: value for key, value in row.items() if key in COLUMNS})
    recorder.close()
    rows = read_metrics(tmp_path)
    assert plots.plot_loss({"run": rows}).png() == plots.plot_loss({"run": training_rows()}).png()


def test_nothing_below_the_notebooks_imports_matplotlib():
    code = "import sys, horovod_lm.train, horovod_lm.generate; print('matplotlib' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert shown.stdout.strip() == "False", shown.stderr


def test_attention_writes_each_weight_where_it_belongs():
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    [axes] = plots.plot_attention(weights, ["the", "cat"], "Who looks at whom").axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "1.00", (1, 0): "0.00", (0, 1): "0.25", (1, 1): "0.75"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["the", "cat"]
    assert "query" in axes.get_ylabel() and "key" in axes.get_xlabel()
