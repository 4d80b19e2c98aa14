"""Live ranks on several hosts: network namespaces, each with a name, an sshd and processes."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest

from horovod_lm.jupyter.cluster import HorovodCluster
from horovod_lm.jupyter.hosts import Hosts, why_not_here
from horovod_lm.jupyter.namespaces import environment
from horovod_lm.utils.config import Config, load_config, save_config
from horovod_lm.utils.errors import ConfigError, DistributedError
from tests.conftest import ROOT
from tests.jupyter.conftest import needs_horovod, wait_until

WHY_NOT = why_not_here()
pytestmark = [
    pytest.mark.horovod,
    needs_horovod,
    pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT)),
]
SECONDS_TO_DETECT = 16  # Gloo waits for 6 s, and the issue gives 10 more

# What the notebook on host0 does. It says what it found as lines of JSON, and hears when to go on.
NOTEBOOK = """
import json, sys, time
from horovod_lm.jupyter.cluster import HorovodCluster

def say(what):
    print(json.dumps(what), flush=True)

def fails(body):
    started = time.monotonic()
    try:
        cluster.run_cell(body)
    except Exception as error:
        say([str(error), time.monotonic() - started])

PLACE = "(hvd.rank(), hvd.local_rank(), hvd.cross_rank(), __import__('socket').gethostname())"
SUM = "int(hvd.allreduce(torch.ones(1), name='sum', op=hvd.Sum))"
with HorovodCluster(hosts=sys.argv[1]) as cluster:
"""


@pytest.fixture
def on_host0(tmp_path):
    """Start a notebook on host0 whose cluster spans the hosts; `body` is what it does."""
    started = []

    def start(hosts: Hosts, body: str):
        settings = tmp_path / "hosts.yaml"
        save_config(hosts.configure(load_config(ROOT / "configs" / "tiny.yaml")), settings)
        lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
        command = [sys.executable, "-c", NOTEBOOK + lines, str(settings)]
        pipes = {"stdin": -1, "stdout": -1, "stderr": open(tmp_path / "stderr", "wb")}
        # A power cut leaves files behind.
        env = {**environment(), "TMPDIR": str(tmp_path)}
        started.append(hosts.popen(command, "host0", env=env, **pipes))
        return started[-1]

    yield start
    for notebook in started:
        notebook.kill()
        notebook.wait()
        for pipe in (notebook.stdin, notebook.stdout):
            pipe.close()


def heard(notebook) -> object:
    return json.loads(notebook.stdout.readline())


def engines(hosts: Hosts, host: str) -> int:
    listed = hosts.run(["ps", "ax", "-o", "args"], host).stdout
    return listed.count("engine_side") + listed.count("jupyter.guardian")


def test_ranks_of_two_hosts_work_fail_in_clear_words_and_work_again(on_host0):
    with Hosts(2, slots=[1, 2]) as hosts:
        notebook = on_host0(
            hosts,
            """
say(cluster.run(PLACE))
say(cluster.run(SUM))
for body in ("1 / 0", "import os; os.kill(os.getpid(), 9)", "import os; os.kill(os.getpid(), 19)"):
    fails(f"if hvd.rank() == 2: {body}\\nhvd.barrier()")
    cluster.restart_ranks()
    say(cluster.run(SUM))
""",
        )
        assert heard(notebook) == [
            [0, 0, 0, "host0"], [1, 0, 1, "host1"], [2, 1, 0, "host1"]
        ]  # fmt: skip
        assert heard(notebook) == [3, 3, 3]
        for words in (
            "rank 2: ZeroDivisionError: division by zero (line 2 of the cell)",
            "rank 2 was killed by SIGKILL, exit code 137",
            "rank 2 was stopped (SIGSTOP), not woken for 2 s, and killed",
        ):
            said, seconds = heard(notebook)
            assert said.startswith(words) and "ranks 0 and 1 were ended with it" in said
            assert seconds < SECONDS_TO_DETECT
            assert heard(notebook) == [3, 3, 3]
        assert notebook.wait(30) == 0
        assert [engines(hosts, name) for name in hosts.names] == [0, 0]


def test_a_lost_host_is_named(on_host0):
    with Hosts(2) as hosts:
        notebook = on_host0(
            hosts, "say('ready')\nfails('import time; time.sleep(3); hvd.barrier()')"
        )
        assert heard(notebook) == "ready"
        time.sleep(1)
        hosts.power_off("host1")
        said, seconds = heard(notebook)
        assert said.startswith("rank 1: LostRankError: its host host1 is lost: ")
        assert seconds - 1 < SECONDS_TO_DETECT


def test_a_killed_notebook_takes_the_ranks_of_every_host_along(on_host0):
    with Hosts(2) as hosts:
        notebook = on_host0(hosts, "say('ready')\nfails('import time; time.sleep(100)')")
        assert heard(notebook) == "ready"
        assert engines(hosts, "host1") == 2
        notebook.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(engines(hosts, name) for name in hosts.names), 10, "their end")


def test_a_host_that_cannot_be_reached_is_named(on_host0, tmp_path):
    with Hosts(2) as hosts:
        (hosts.folder / "key").chmod(0o644)  # ssh refuses a key that others may read
        notebook = on_host0(hosts, "pass")
        assert notebook.wait(60) != 0
        said = (tmp_path / "stderr").read_text().splitlines()[-1]
        assert "rank 1" in said and "its host host1 is lost: " in said and "denied" in said


# ---- what is wrong before anything starts --------------------------------------------------------


def config_of(*hosts: dict, **distributed: object) -> Config:
    return Config().with_overrides({"distributed": {"hosts": list(hosts), **distributed}})


def test_a_configuration_that_cannot_be_is_one_sentence():
    with pytest.raises(ConfigError, match="distributed.hosts is empty"):
        HorovodCluster(hosts=Config())
    elsewhere = HorovodCluster(hosts=config_of({"name": "192.0.2.1", "slots": 2}))
    assert elsewhere.n == 2
    with pytest.raises(DistributedError, match="192.0.2.1 is not this machine: distr"):
        elsewhere.start()
    here = config_of({"name": "localhost", "slots": 1}, interface="eth99")
    with pytest.raises(DistributedError, match="no address on the interface eth99: set distribut"):
        HorovodCluster(hosts=here).start()
