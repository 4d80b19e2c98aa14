"""Elastic runs on real processes, for tests and for the table of faults.

The ranks of `ranks_elastic.py` record every step; the functions here read these records.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horovod_lm.data import get_dataloaders
from horovod_lm.launch.elastic_hosts import elastic_command, loopback_name, write_hosts
from horovod_lm.training.metrics import read_metrics
from horovod_lm.utils.config import load_config
from tests.conftest import ROOT, Command, Finished

GLOO_TIMEOUT = 8  # seconds
STEPS, COMMIT_INTERVAL = 120, 5
SETTINGS = {
    "training.max_steps": STEPS,
    "training.num_epochs": 20,
    "training.commit_interval": COMMIT_INTERVAL,
    "training.checkpoint_interval": COMMIT_INTERVAL,
    "training.keep_last_checkpoints": 1000,
    "training.eval_interval": 40,
    "distributed.gloo_timeout_seconds": GLOO_TIMEOUT,
    "distributed.reduction_groups": 1,
}
FAULTS = {"killed": signal.SIGKILL, "exception": signal.SIGUSR1, "stopped": signal.SIGSTOP}


class ElasticRun:
    """`horovodrun` with a file of hosts of one rank each: names of this machine, or others.

    Args:
        project: folder of `configs/tiny.yaml`.
        name: the run's name.
        workers: ranks at the start.
        settings: override `SETTINGS`.
        late: seconds that each rank waits before it initialises Horovod.
        staged: reduce gradients in CPU memory, as for ranks that share a GPU.
        hosts: names of hosts; None: one name of this machine for each worker.
        enter: the command that runs another one on the first host.
        **options: of `elastic_command`.
    """

    def __init__(
        self,
        project: Path,
        name: str,
        workers: int,
        settings: dict[str, Any] | None = None,
        late: float = 0,
        staged: bool = False,
        hosts: Sequence[str] | None = None,
        enter: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.folder = project / "runs" / name
        names = hosts or [loopback_name(number) for number in range(workers)]
        self.hosts = [f"{host}:1" for host in names]
        self._hosts_ever = workers
        self._hosts_file = write_hosts(project / f"{name}.hosts", self.hosts)
        rank = [sys.executable, str(ROOT / "tests" / "ranks_elastic.py"), "--elastic"]
        rank += ["--config", "configs/tiny.yaml", "--run-name", name]
        for key, value in {**SETTINGS, **(settings or {})}.items():
            rank += ["--set", f"{key}={value}"]
        call = elastic_command(rank, self._hosts_file, **options)
        call[0] = str(Path(sys.executable).with_name(call[0]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["SECONDS_BEFORE_HOROVOD"] = str(late)
        environment["STAGE_GRADIENTS"] = "1" if staged else ""
        self.command = Command([*enter, *call], project, environment)

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a rank; return when, as `time.time()`."""
        self.command.descendants()
        os.kill(self.process_id(rank), number)
        return time.time()

    def add_host(self) -> float:
        """Let a worker join; return when. A host that has lost a rank is not used again."""
        self.hosts.append(f"{loopback_name(self._hosts_ever)}:1")
        self._hosts_ever += 1
        write_hosts(self._hosts_file, self.hosts)
        return time.time()

    def remove_host(self, number: int) -> float:
        """Let the worker of a line of the file of hosts leave; return when."""
        del self.hosts[number]
        write_hosts(self._hosts_file, self.hosts)
        return time.time()

    def wait_for_step(self, step: int, timeout: float = 60) -> None:
        self.command.wait_until(lambda: self.last_step() >= step, timeout)

    def wait_for_world(self, number: int, timeout: float = 60) -> dict[str, Any]:
        """Wait until the ranks have changed for the `number`th time; return rank 0's event."""
        self.command.wait_until(lambda: len(self.worlds()) >= number, timeout)
        return self.worlds()[number - 1]

    def finish(self, timeout: float = 90) -> Finished:
        """Let the run go to its end at full speed."""
        (self.folder / "hurry").touch()
        return self.command.wait(timeout)

    def last_step(self) -> int:
        return max((line["step"] for line in self.witnesses()), default=0)

    def worlds(self) -> list[dict[str, Any]]:
        """Return rank 0's event of each change of ranks."""
        return [line for line in self._lines("logs/rank0.jsonl") if line["event"] == "new_world"]

    def process_id(self, rank: int) -> int:
        """Return the process that has this rank now."""
        lines = self._lines(f"logs/rank{rank}.jsonl")
        return [line["pid"] for line in lines if line["event"] == "start"][-1]

    def witnesses(self) -> list[dict[str, Any]]:
        """Return every rank's record of every step."""
        names = [path.name for path in self.folder.glob("witness-*.jsonl")]
        return [line for name in names for line in self._lines(name)]

    def history(self) -> dict[int, list[dict[str, Any]]]:
        """Return, for each step, the records of the ranks that took it last."""
        by_step = defaultdict(list)
        for line in self.witnesses():
            by_step[line["step"]].append(line)
        return {
            step: [line for line in lines if line["world"] == max(each["world"] for each in lines)]
            for step, lines in by_step.items()
        }

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def what_was_said(output: str, world: dict[str, Any]) -> str:
    """Return a run's message about a change of its ranks, and the lost steps."""
    said = re.search(r"(a rank was lost|ranks left or joined).*", output)
    return f"{said.group() if said else 'nothing was said'}; lost: {world['steps_lost']}"


def assert_nothing_was_lost(run: ElasticRun, tiny_project: Path) -> None:
    """Check each step: all ranks equal, every sample once, repeated steps counted.

    A lost rank may have taken part in a committed step without having recorded it.
    """
    history = run.history()
    assert sorted(history) == [*range(1, STEPS + 1)]
    committed = {world["step"] for world in run.worlds() if world["why"] == "a rank was lost"}
    samples: dict[int, Counter] = {}
    unrecorded = set()
    for step, lines in history.items():
        missing = {*range(lines[0]["ranks"])} - {line["rank"] for line in lines}
        assert not missing or (step in committed and len(missing) == 1), step
        unrecorded |= {lines[0]["epoch"]} if missing else set()
        assert len({line["fingerprint"] for line in lines}) == 1, f"replicas differ at {step}"
        for line in lines:
            samples.setdefault(line["epoch"], Counter()).update(line["samples"])
    train_loader, _ = get_dataloaders(load_config(tiny_project / "configs" / "tiny.yaml"), 0, 1)
    for epoch, seen in samples.items():
        whole = Counter(range(len(train_loader.dataset)))
        is_whole = epoch < max(samples) and epoch not in unrecorded
        assert seen == whole if is_whole else seen <= whole, epoch
    replayed = sum(world["steps_lost"] for world in run.worlds())
    rows = read_metrics(run.folder, "train")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert rows[-1]["steps_replayed"] == replayed
    assert [row["world_size"] for row in rows] == [
        history[step][0]["ranks"] for step in range(1, STEPS + 1)
    ]
