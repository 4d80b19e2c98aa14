"""Allreduce over shaped links: the stored table follows the ring's formula, and so do links now."""

from __future__ import annotations

import csv
import importlib.util

import pytest

from horovod_lm.analysis.scaling import Network
from horovod_lm.teaching.simulated_hosts import why_not_here
from tests.conftest import ROOT

BENCHMARKS = ROOT / "tests" / "benchmarks"
WHY_NOT = why_not_here()
# Shorter than this by the formula, a message fits into the bucket and the queue of the link: what
# is measured then is not its rate.
BOUND_BY_RATE = 0.05
ALLOWED = 0.2


def stored() -> list[dict[str, float]]:
    with open(BENCHMARKS / "allreduce_over_links.csv", encoding="utf-8") as file:
        return [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]


def script():
    """The measuring script, which is no part of the package."""
    path = BENCHMARKS / "allreduce_over_links.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_within_a_fifth_of_the_formula_wherever_the_rate_decides():
    rows = [row for row in stored() if row["formula_seconds"] >= BOUND_BY_RATE]
    assert {row["workers"] for row in rows} == {2, 3}
    for workers in (2, 3):
        measured = {row["megabits_per_second"] for row in rows if row["workers"] == workers}
        assert len(measured) == 3
    for row in rows:
        assert abs(row["seconds"] / row["formula_seconds"] - 1) <= ALLOWED, row


def test_the_tables_formula_is_the_cost_models():
    for row in stored():
        network = Network(latency=0, bandwidth=row["megabits_per_second"] * 1e6 / 8)
        seconds = network.allreduce_seconds(row["bytes"], int(row["workers"]))
        assert row["formula_seconds"] == pytest.approx(seconds, abs=1e-6)


@pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
def test_a_link_of_today_follows_the_formula_too(monkeypatch):
    links = script()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(links, "SIZES", (2**22,))
    [row] = links.measure(workers=2, megabits=15)
    # Slow, so that the link decides on a machine that does other things too.
    assert 0.9 < row["seconds"] / row["formula_seconds"] < 1.4, row
