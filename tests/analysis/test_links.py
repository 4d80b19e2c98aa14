"""Allreduce over slow links: the stored table and a new measurement follow the ring's formula."""

from __future__ import annotations

import csv

import pytest

from horovod_lm.analysis.scaling import Network
from horovod_lm.teaching.simulated_hosts import why_not_here
from tests.benchmarks import allreduce_over_links as links
from tests.conftest import ROOT

TABLE = ROOT / "tests" / "benchmarks" / "allreduce_over_links.csv"
WHY_NOT = why_not_here()
# A message that would be faster by the formula fits into the link's burst and queue, and its time
# does not depend on the rate.
BOUND_BY_RATE = 0.05
ALLOWED = 0.2


def test_the_table_is_within_a_fifth_of_the_cost_model_where_the_rate_decides():
    with TABLE.open(encoding="utf-8") as file:
        rows = [{key: float(text) for key, text in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        network = Network(latency=0, bandwidth=row["megabits_per_second"] * 1e6 / 8)
        seconds = network.allreduce_seconds(row["bytes"], int(row["workers"]))
        assert row["formula_seconds"] == pytest.approx(seconds, abs=1e-6)
    slow = [row for row in rows if row["formula_seconds"] >= BOUND_BY_RATE]
    assert {(row["workers"], row["megabits_per_second"]) for row in slow} == {
        (workers, rate) for workers in (2, 3) for rate in links.RATES
    }
    for row in slow:
        assert abs(row["seconds"] / row["formula_seconds"] - 1) <= ALLOWED, row


@pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
def test_a_new_measurement_follows_the_formula(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(links, "SIZES", (2**20,))
    [row] = links.measure(workers=2, megabits=15)
    # At a low rate the link decides even on a machine with other load.
    assert 0.9 < row["seconds"] / row["formula_seconds"] < 1.4, row
