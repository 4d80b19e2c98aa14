"""The command that resumes an interrupted run on the same hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from horovod_lm.training.run_logger import resume_command
from horovod_lm.utils.config import Config

RUN = Path("/project/runs/mine")
RESUME = f"python -m horovod_lm.train --resume {RUN}"
NAMED = {"distributed.hosts": [{"name": "node0"}, {"name": "node1", "slots": 2}]}


@pytest.mark.parametrize(
    ("hosts", "settings", "call"),
    [
        (["here"], {}, RESUME),
        (["here"] * 3, {}, f"horovodrun -np 3 {RESUME}"),
        (["a", "b", "b"], {}, f"horovodrun -np 3 -H a:1,b:2 {RESUME}"),
        (
            ["node0", "node1", "node1"],
            NAMED,
            f"python -m horovod_lm.launch.hosts --config {RUN}/config.yaml --run -- {RESUME}",
        ),
        (["here"] * 2, NAMED, f"horovodrun -np 2 {RESUME}"),  # started on one of them alone
    ],
)
def test_the_command_resumes_a_run_on_its_hosts(hosts, settings, call):
    assert resume_command(Config().with_overrides(settings), RUN, hosts, elastic=False) == call


def test_an_elastic_run_is_resumed_by_its_own_call():
    said = resume_command(Config(), RUN, ["localhost", "127.0.0.1"], elastic=True)
    assert said == f"start the same call again with --resume {RUN}"
