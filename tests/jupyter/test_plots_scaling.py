"""The figure of scaling shows the cost model's numbers, and can be read without colours."""

from __future__ import annotations

import pytest

from horovod_lm.jupyter import plots
from horovod_lm.scaling import GBIT, Job, Measurement, Network, breaking_point, step

NETWORK = Network(2e-5, 10 * GBIT)
JOB = Job(124e6, 0.4, overlap=0.8)
MEASURED = [Measurement(size, workers, workers * size / 1e9)
            for workers in (2, 3) for size in (1e6, 1e7)]  # fmt: skip


def scene(**changes) -> plots.Scene:
    return plots.Scene(**{"job": JOB, "network": NETWORK, "workers": 48, "workers_per_host": 8,
                          "measurements": MEASURED, **changes})  # fmt: skip


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
    }


def test_every_line_is_what_the_model_predicts():
    steps, efficiency, _ = (lines_of(axes) for axes in plots.plot_scaling(scene()).axes)
    for workers, seconds in steps["step"]:
        assert seconds == step(JOB, NETWORK, workers, 8).seconds
    for workers, seconds in steps["allreduce"]:
        assert workers > 8 and seconds == step(JOB, NETWORK, workers, 8).communication
    assert steps["arithmetic"][0][1] == 0.4
    [(workers, share)] = efficiency[f"chosen: {step(JOB, NETWORK, 48, 8).efficiency:.0%}"]
    assert (workers, share) == (48, step(JOB, NETWORK, 48, 8).efficiency)


def test_the_line_bends_where_a_second_node_is_needed():
    steps = lines_of(plots.plot_scaling(scene()).axes[0])
    assert {8, 9, 48, 1024} <= {workers for workers, _ in steps["step"]}


def test_where_it_breaks_is_marked():
    found = breaking_point(JOB, NETWORK, 8)
    efficiency = lines_of(plots.plot_scaling(scene()).axes[1])
    assert [x for x, _ in efficiency[f"breaks at {found:,} workers"]] == [found, found]
    quick = scene(network=Network(0, 10_000 * GBIT))
    assert not [name for name in lines_of(plots.plot_scaling(quick).axes[1]) if "breaks" in name]


def test_measured_points_stand_beside_the_line_of_as_many_nodes():
    links = lines_of(plots.plot_scaling(scene()).axes[2])
    assert links["2 nodes, measured"] == [(1e6, 2e-3), (1e7, 2e-2)]
    assert links["3 nodes, measured"] == [(1e6, 3e-3), (1e7, 3e-2)]
    for size, seconds in links["3 nodes, predicted"]:
        assert seconds == NETWORK.allreduce_seconds(size, 3)
    [(size, seconds)] = [points[0] for name, points in links.items() if "chosen" in name]
    assert (size, seconds) == (JOB.bytes_reduced, NETWORK.allreduce_seconds(496e6, 6))


@pytest.mark.parametrize("workers", [1, 8])
def test_one_node_has_no_link_to_draw_and_says_so(workers):
    steps, _, links = plots.plot_scaling(scene(workers=workers, measurements=())).axes
    assert not links.lines and "nothing crosses the network" in links.texts[0].get_text()
    assert steps.lines[0].get_label() == "step"


def test_it_can_be_read_without_colours_and_has_units():
    plot = plots.plot_scaling(scene())
    assert plot.get_suptitle()
    for axes in plot.axes:
        looks = [(line.get_linestyle(), line.get_marker()) for line in axes.lines]
        assert len(set(looks)) == len(looks)
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
    steps, _, links = plot.axes
    assert "seconds" in steps.get_ylabel() and "bytes" in links.get_xlabel()


@pytest.mark.parametrize("seconds", [0.052, 0.4, 40.0])
def test_the_axis_of_time_names_seconds_and_no_powers_of_ten(seconds):
    plot = plots.plot_scaling(scene(job=Job(124e6, seconds)))
    plot.canvas.draw()
    for axes in (plot.axes[0], plot.axes[2]):
        bottom, top = axes.get_ylim()
        ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        names = [tick.label1.get_text() for tick in ticks if bottom <= tick.get_loc() <= top]
        assert len([name for name in names if name]) >= 2
        assert all(name.endswith("s") and "times" not in name for name in names if name)


def test_it_shows_itself_the_same_at_every_execution():
    first, second = plots.plot_scaling(scene()), plots.plot_scaling(scene())
    assert repr(first) == repr(second) and first.png() == second.png()
