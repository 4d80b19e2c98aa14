"""The cost model of ring allreduce: fits, properties and limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.analysis.scaling import (
    GBIT,
    Job,
    Measurement,
    Network,
    breaking_point,
    curve,
    fit_network,
    relative_errors,
    smallest_batch,
    step,
)

LATENCIES = st.floats(1e-7, 1e-2)
BANDWIDTHS = st.floats(1e6, 1e11)
WORKERS = st.integers(2, 2048)


@given(LATENCIES, BANDWIDTHS, WORKERS)
def test_a_fit_finds_the_network_that_made_the_measurements(latency, bandwidth, workers):
    network = Network(latency, bandwidth)
    # From sizes dominated by latency to sizes dominated by bandwidth.
    turning = latency * bandwidth * workers
    sizes = [turning * factor for factor in (1e-3, 1e-1, 1, 10, 1e3)]
    rows = [Measurement(size, workers, network.allreduce_seconds(size, workers)) for size in sizes]
    found = fit_network(rows)
    assert found.latency == pytest.approx(latency, rel=1e-4)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-4)
    assert max(map(abs, relative_errors(found, rows))) < 1e-4


def test_a_fit_with_noise_has_no_negative_latency():
    rows = [Measurement(size, 2, size / 1e9 * noise) for size, noise in
            ((1e6, 0.95), (4e6, 1.04), (16e6, 1.0), (64e6, 1.02))]  # fmt: skip
    found = fit_network(rows)
    assert found.latency >= 0 and found.bandwidth == pytest.approx(1e9, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "at least two sizes"),
        ([(1e6, 2, 0.1), (1e6, 4, 0.2)], "at least two sizes"),
        ([(1e6, 1, 0.1), (2e6, 1, 0.2)], "at least two sizes"),
        ([(1e6, 2, 0.2), (8e6, 2, 0.0001)], "do not grow"),
    ],
)
def test_measurements_that_cannot_be_fitted_are_refused(rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_network(Measurement(*row) for row in rows)


@given(WORKERS, LATENCIES, BANDWIDTHS, st.floats(0, 1), st.floats(1e-3, 10))
def test_a_step_is_never_faster_than_its_parts(workers, latency, bandwidth, overlap, seconds):
    job = Job(1e7, seconds, overlap)
    found = step(job, Network(latency, bandwidth), workers)
    assert found.seconds >= max(seconds, found.communication * (1 - 1e-12)) - 1e-12
    assert found.seconds <= seconds + found.communication + 1e-12
    assert 0 < found.efficiency <= 1


@given(LATENCIES, BANDWIDTHS, st.floats(0, 1))
def test_efficiency_falls_with_workers_and_rises_with_batch(latency, bandwidth, overlap):
    network = Network(latency, bandwidth)
    steps = curve(Job(1e8, 0.2, overlap), network, (1, 2, 4, 64, 1024))
    falling = [one.efficiency for one in steps]
    assert falling == sorted(falling, reverse=True)
    jobs = [Job(1e8, seconds, overlap) for seconds in (0.2, 0.4, 0.8)]
    rising = [step(job, network, 64).efficiency for job in jobs]
    assert rising == sorted(rising)


@given(WORKERS, LATENCIES, BANDWIDTHS, st.floats(0.1, 1))
def test_at_the_smallest_batch_communication_is_just_hidden(workers, latency, bandwidth, overlap):
    network, per_sample = Network(latency, bandwidth), 0.01
    batch = smallest_batch(per_sample, Job(1e7, 0.0, overlap), network, workers)
    at = Job(1e7, batch * per_sample, overlap)
    assert step(at, network, workers).exposed == pytest.approx(0, abs=1e-9 * at.seconds_per_step)
    below = step(Job(1e7, 0.9 * batch * per_sample, overlap), network, workers)
    assert below.exposed > 0 and below.efficiency < 1
    assert smallest_batch(per_sample, Job(1e7, 0.0, overlap=0), network, workers) == math.inf


def test_workers_of_a_host_share_its_link_and_halving_the_bytes_halves_the_time():
    job, network = Job(138e6, 0.42, overlap=0), Network(0, 25 * GBIT)
    on_128_hosts = step(job, network, 512, workers_per_host=4)
    assert on_128_hosts.communication == step(job, network, 128).communication
    half = step(Job(138e6, 0.42, 0, bytes_per_gradient=2), network, 512, 4)
    assert half.communication == pytest.approx(on_128_hosts.communication / 2)


@given(LATENCIES, BANDWIDTHS, st.integers(1, 16), st.floats(0.05, 0.99))
def test_the_breaking_point_is_the_first_number_of_workers_that_is_too_slow(
    latency, bandwidth, many, least
):
    job, network = Job(1e8, 0.2), Network(latency, bandwidth)
    found = breaking_point(job, network, many, efficiency=least, most=4096)
    if found is None:
        assert step(job, network, 4096, many).efficiency >= least
    else:
        assert step(job, network, found, many).efficiency < least
        assert step(job, network, found - 1, many).efficiency >= least


def test_a_quicker_link_inside_a_host_is_counted_in_every_prediction():
    job, network = Job(1e8, 0.2), Network(1e-5, 1e9)
    slow = Network(1e-5, 1e7)
    assert breaking_point(job, network, 8) > 8 > breaking_point(job, network, 8, slow)
    [alone, pair] = curve(job, network, (1, 2), 8, slow)
    assert (alone.seconds, alone.communication, alone.efficiency) == (0.2, 0, 1)
    assert pair.communication == slow.allreduce_seconds(4e8, 2)
    inside = smallest_batch(0.01, job, network, 8, workers_per_host=8, inside=slow)
    at = Job(1e8, inside * 0.01)
    assert step(at, network, 8, 8, slow).exposed == pytest.approx(0, abs=1e-9)


def test_gradients_hide_only_behind_the_last_of_several_passes():
    network = Network(0, 1e9)
    once, four = Job(1e8, 1.0), Job(1e8, 1.0, passes=4)
    assert step(four, network, 2).exposed > step(once, network, 2).exposed == 0
