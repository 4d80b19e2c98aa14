"""The command that resumes an interrupted run on the same hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from horovod_lm.training.run_logger import resume_command
from horovod_lm.utils.config import Config

RUN = Path("/project/runs/mine")
RESUME = f"python -m horovod_lm.train --resume {RUN}"
CLUSTER = f"python -m horovod_lm.launch.hosts --config {RUN}/config.yaml --run -- {RESUME}"
NAMED = {"distributed.hosts": [{"name": "node0"}, {"name": "node1", "slots": 2}]}


@pytest.mark.parametrize(
    ("hosts", "settings", "call"),
    [
        (["a", "b", "b"], {}, f"horovodrun -np 3 -H a:1,b:2 {RESUME}"),
        (["node0", "node1", "node1"], NAMED, CLUSTER),
        (["here"] * 2, NAMED, f"horovodrun -np 2 {RESUME}"),  # started on one of them alone
    ],
)
def test_the_command_resumes_a_run_on_its_hosts(hosts, settings, call):
    assert resume_command(Config().with_overrides(settings), RUN, hosts, elastic=False) == call
