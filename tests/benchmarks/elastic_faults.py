"""What elastic training makes of each fault, measured on real processes: a table in Markdown.

    python tests/benchmarks/elastic_faults.py           # all, about three minutes on two cores
    python tests/benchmarks/elastic_faults.py stopped   # those whose name has this in it

"Noticed after" runs from the fault to the moment when rank 0 of those left knows of it;
"training after" ends when they train again. Steps lost are those that the ranks had taken since the
last commit; steps replayed are what `metrics.csv` counts at the end. The Gloo timeout, after which
a rank that stands still is missed, is what `tests/elastic_runs.py` sets.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from horovod_lm.data import prepare_data
from horovod_lm.training.metrics import read_metrics
from horovod_lm.utils.config import load_config
from tests.conftest import TINY
from tests.elastic_runs import FAULTS, GLOO_TIMEOUT, ElasticRun

COLUMNS = (
    "event", "ranks", "noticed after", "training after", "message", "lost", "replayed",
    "left behind",
)  # fmt: skip
Event = Callable[[ElasticRun], float]
TOO_FEW = {"training.elastic_timeout_seconds": 5}


def fault(kind: str, rank: int) -> Event:
    return lambda run: run.signal(rank, FAULTS[kind])


EVENTS: dict[str, tuple[int, dict, Event]] = {
    **{
        f"{kind}: rank {rank} of 2": (2, {}, fault(kind, rank))
        for kind in FAULTS
        for rank in (0, 1)
    },
    "killed: rank 1 of 3": (3, {}, fault("killed", 1)),
    "a host joins": (1, {}, lambda run: run.add_host()),
    "a host leaves": (2, {}, lambda run: run.remove_host(1)),
    "killed: rank 1 of 2, min_np 2": (
        2, {"min_np": 2, "timeout_seconds": 12, "settings": TOO_FEW}, fault("killed", 1)
    ),
}  # fmt: skip


def measure(project: Path, event: str) -> tuple[str, ...]:
    """Run one event; return its row of the table."""
    workers, options, happen = EVENTS[event]
    run = ElasticRun(project, re.sub(r"\W+", "-", event), workers, **options)
    try:
        run.wait_for_step(12)
        at = happen(run)
        if "min_np" in options:
            return row_of_an_end(run, event)
        world = run.wait_for_world(1)
        finished = run.finish()
        if finished.code != 0:
            raise SystemExit(
                f"{event}: ended with code {finished.code}:\n{finished.output[-4000:]}"
            )
        message = re.search(r"\S*(a rank was lost|ranks left or joined).*", finished.output).group()
        return (
            event,
            f"{world['ranks_before']} -> {world['ranks']}",
            f"{world['time'] - world['seconds'] - at:.1f} s",
            f"{world['time'] - at:.1f} s",
            re.sub(r"^\[.*?>:", "", message),
            str(world["steps_lost"]),
            str(read_metrics(run.folder, "train")[-1]["steps_replayed"]),
            str(len(run.command.left_behind())),
        )
    finally:
        run.command.kill()


def row_of_an_end(run: ElasticRun, event: str) -> tuple[str, ...]:
    before = time.monotonic()
    finished = run.command.wait(60)
    message = re.search(r"error: too few ranks.*", finished.output)
    return (
        event,
        "2 -> 0",
        "",
        f"ended after {time.monotonic() - before:.1f} s",
        message.group() if message else "none",
        "",
        "",
        str(len(run.command.left_behind())),
    )


def main() -> None:
    wanted = [event for event in EVENTS if all(word in event for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "configs").mkdir()
        (project / "configs" / "tiny.yaml").write_text(TINY, encoding="utf-8")
        prepare_data(load_config(project / "configs" / "tiny.yaml"))
        print(f"Gloo timeout {GLOO_TIMEOUT} s\n\n| {' | '.join(COLUMNS)} |")
        print("|---" * len(COLUMNS) + "|", flush=True)
        for event in wanted:
            row = (cell.replace(folder, "") for cell in measure(project, event))
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
