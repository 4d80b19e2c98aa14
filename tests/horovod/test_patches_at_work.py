"""The effect of Horovod's patches on real processes: each test fails without its patch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
from pathlib import Path

import psutil
import pytest

from horovod_lm.analysis.timeline import read_timeline, reduction
from horovod_lm.setup.install_horovod import installed_version, key_of
from horovod_lm.setup.toolchain import inspect_toolchain
from tests.conftest import HOROVODRUN, Command, Finished

pytestmark = pytest.mark.horovod


@pytest.fixture(scope="module", autouse=True)
def built_with_these_patches():
    if key_of(installed_version()) != inspect_toolchain().key:
        pytest.skip("Horovod was built with other patches or options: make setup")


@pytest.fixture
def run(tmp_path):
    """Run a command to its end in an empty folder; at the time limit its processes are killed."""

    def run(*command: str, timeout: float = 60, **variables: str) -> Finished:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
        # 15-no-proxy: without it, every job of horovod.run() and every elastic job fails.
        env |= {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        return Command(command, tmp_path, env | variables).wait(timeout)

    return run


@pytest.fixture
def run_ranks(tmp_path, run):
    """Run a script on two ranks under horovodrun."""

    def run_script(script: str, *options: str, **variables: str) -> Finished:
        (tmp_path / "rank.py").write_text(script)
        command = [str(HOROVODRUN), "-np", "2", "--gloo", *options, sys.executable, "rank.py"]
        return run(*command, **variables)

    return run_script


RANK_1_IS_LATE_AND_THEN_STAYS_AWAY = """
import time
import horovod.torch as hvd
import torch

hvd.init()
hvd.allreduce(torch.ones(1), name="both are here")
if hvd.rank() == 1:
    time.sleep(2)
started = time.thread_time()
hvd.allreduce(torch.ones(1), name="rank 0 waits")
if hvd.rank() == 0:
    print(f"waited with {time.thread_time() - started:.3f} s of CPU time", flush=True)
else:
    time.sleep(600)
hvd.allreduce(torch.ones(1), name="rank 1 is missing")
"""


def test_a_missing_rank_is_waited_for_without_cpu_time_named_and_ends_the_job(run_ranks):
    # 29-sleep-while-waiting: without it the waiting thread is busy for the two seconds.
    # 06-stall-check: without it this hangs until the time limit of the helper.
    times = "--stall-check-warning-time-seconds 1 --stall-check-shutdown-time-seconds 6".split()
    done = run_ranks(RANK_1_IS_LATE_AND_THEN_STAYS_AWAY, *times)
    [busy] = re.findall("waited with (.*) s of CPU time", done.output)
    assert float(busy) < 0.2, done.output
    assert done.code != 0
    assert re.search(r"1!?: \[allreduce\.rank 1 is missing\]", done.output), done.output
    assert "is stalled for longer than 6 seconds. Will shutdown." in done.output, done.output


SOCKETS_OF_THIS_RANK = """
import json
import os
import horovod.torch as hvd
import psutil
import torch

os.environ["HOROVOD_GLOO_IFACE"] = "{interface}"  # as --network-interface does across hosts
hvd.init(process_sets=[hvd.ProcessSet([0])])  # besides the set of all ranks, always there
hvd.allreduce(torch.ones(1), name="the connections are made")
addresses = {{c.laddr.ip for c in psutil.Process().net_connections(kind="tcp") if c.laddr}}
for rank, found in enumerate(hvd.allgather_object(sorted(addresses))):
    if hvd.rank() == 0:
        print("SOCKETS", json.dumps(found))
"""


def interface_that_the_host_name_does_not_name() -> tuple[str, set[str]]:
    """A network interface, with its addresses, that Gloo would not take of its own accord."""
    by_name = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None)}
    up = psutil.net_if_stats()
    for interface, entries in sorted(psutil.net_if_addrs().items()):
        families = (socket.AF_INET, socket.AF_INET6)
        addresses = {e.address.split("%")[0] for e in entries if e.family in families}
        if addresses and not addresses & by_name and up[interface].isup:
            return interface, addresses
    pytest.skip(f"every network interface here is the one that the host's name means: {by_name}")


def test_every_socket_of_a_rank_is_on_the_chosen_interface(run_ranks):
    # 07-process-set-interface: without it the sockets of the process sets (the global one is such
    # a set) listen at the address that the host's name resolves to.
    interface, addresses = interface_that_the_host_name_does_not_name()
    done = run_ranks(SOCKETS_OF_THIS_RANK.format(interface=interface))
    assert done.code == 0, done.output
    lines = re.findall(r"SOCKETS (.*)", done.output)
    assert len(lines) == 2, done.output
    for of_rank in map(json.loads, lines):
        assert of_rank and set(of_rank) <= addresses, (interface, addresses, lines)


IDLE_RANKS = """
import json
import horovod


def idle():
    import os
    import time
    import horovod.torch as hvd
    import torch

    names = "HOROVOD_CYCLE_TIME", "HOROVOD_CACHE_CAPACITY"
    hvd.init()
    hvd.allreduce(torch.ones(1), name="awake")
    shares = []
    for _ in range(5):
        wall, cpu = time.monotonic(), time.process_time()
        time.sleep(0.6)
        shares.append((time.process_time() - cpu) / (time.monotonic() - wall))
    hvd.allreduce(torch.ones(1), name="nobody leaves while another is measured")
    hvd.shutdown()
    return [os.environ[name] for name in names if name in os.environ], min(shares)


def fail():
    raise ValueError("no answer")


if __name__ == "__main__":
    print("IDLE", json.dumps(horovod.run(idle, np=2, use_gloo=True)))
    try:
        horovod.run(fail, np=1, use_gloo=True)
    except RuntimeError as error:
        print("RAISED", error)
"""


def test_idle_ranks_of_horovod_run_do_not_use_a_whole_core(tmp_path, run):
    # 09-run-settings. Measured on two cores, quiet or with three busy loops beside: 0.05 to 0.15
    # of a core per rank, and 0.4 to 1.0 with what the release exports. The minimum of five, because
    # other load can only add to it; without the timeline, whose writer keeps a core of rank 0 busy.
    (tmp_path / "idle.py").write_text(IDLE_RANKS)
    done = run(sys.executable, "idle.py")
    assert done.code == 0, done.output
    assert "RAISED process 0 was the first to fail, with exit code 1" in done.output
    ranks = json.loads(re.search(r"IDLE (.*)", done.output).group(1))
    assert all(float(value) >= 0 for exported, _ in ranks for value in exported), ranks
    assert sum(share for _, share in ranks) < 0.5, ranks


SAVE_WHEN_STOPPED = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit()

signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""
STOP_WHEN_READY = """
import pathlib, shlex, sys, threading, time
from horovod.runner.common.util import safe_shell_exec

def stop_when_ready():
    while not pathlib.Path("ready").exists():
        time.sleep(0.1)
    stop.set()

if __name__ == "__main__":
    stop = threading.Event()
    threading.Thread(target=stop_when_ready, daemon=True).start()
    command = f"{sys.argv[1]} {shlex.quote(sys.executable)} rank.py"
    safe_shell_exec.execute(command, events=[stop])
    print(safe_shell_exec.GRACEFUL_TERMINATION_TIME_S)
"""


@pytest.mark.parametrize(
    ("start", "limit", "saved"), [("exec", "", True), ("true;", "4", True), ("true;", "0.3", False)]
)
def test_a_rank_that_is_stopped_has_time_to_save(tmp_path, run, start, limit, saved):
    """08-terminate-before-stop. With `exec`, every shell does what bash does by itself."""
    (tmp_path / "rank.py").write_text(SAVE_WHEN_STOPPED)
    (tmp_path / "stop.py").write_text(STOP_WHEN_READY)
    variables = {"HOROVOD_GRACEFUL_TERMINATION_SECONDS": limit} if limit else {}
    done = run(sys.executable, "stop.py", start, **variables)
    assert float(done.output) == float(limit or 30)
    assert (tmp_path / "saved").exists() is saved and done.seconds < 8


SECOND_INIT = """
import horovod.torch as hvd
import torch

for world in range(8):
    hvd.init()
    hvd.allreduce(torch.ones(1), name="here")
    hvd.shutdown()
print("EIGHT WORLDS", flush=True)
"""


@pytest.mark.parametrize(
    "times", ["--cycle-time-ms 5", "--cycle-time-ms 5 --fusion-threshold-mb 8"]
)
def test_a_process_can_start_horovod_again(run_ranks, times):
    # 10-second-init: without it a segmentation fault. 24-finished-scopes: without it "Connection
    # refused" in five of eight such runs.
    done = run_ranks(SECOND_INIT, *times.split())
    assert done.code == 0, done.output
    assert done.output.count("EIGHT WORLDS") == 2


MANY_EVENTS = """
import time
import horovod.torch as hvd
import torch

hvd.init()
started = time.monotonic()
for step in range(3):
    waiting = [hvd.allreduce_async(torch.ones(1), name=f"number {i}") for i in range(100)]
    for handle in waiting:
        hvd.synchronize(handle)
print("SECONDS", time.monotonic() - started, flush=True)
"""


def test_a_waiting_rank_ends_a_cycle_and_the_timeline_is_whole(run_ranks, tmp_path):
    # 23-timeline-end: without it the last events are missing, on a busy machine all of them.
    # 30-waiting-ends-a-cycle: without it two steps of three take a whole cycle each.
    timeline = ["--timeline-filename", str(tmp_path / "timeline.json")]
    done = run_ranks(MANY_EVENTS, *timeline, "--cycle-time-ms", "2000")
    assert done.code == 0, done.output
    seconds = [float(one) for one in re.findall(r"SECONDS (.+)", done.output)]
    assert len(seconds) == 2 and max(seconds) < 3
    json.loads((tmp_path / "timeline.json").read_text())  # not truncated
    spans = read_timeline(tmp_path / "timeline.json")
    assert reduction(spans, 3) == []
    for number in range(3):
        of_step = reduction(spans, number)
        for phase in ("NEGOTIATE_ALLREDUCE", "ALLREDUCE", "GLOO_ALLREDUCE"):
            assert len({span.tensor for span in of_step if span.phase == phase}) == 100


ONE_RANK_STAYS_AWAY_FROM_INIT = """
import os
import pathlib
import time
import horovod.torch as hvd

os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = "2"
if os.environ["HOROVOD_RANK"] == "1":
    while not pathlib.Path("tried").exists():
        time.sleep(0.1)
else:
    for attempt in range(2):
        try:
            hvd.init()
        except ValueError:
            print("INIT FAILED", flush=True)
        hvd.shutdown()
    pathlib.Path("tried").touch()
"""


def test_a_failing_init_raises_and_can_be_tried_again(run_ranks):
    # 11-failing-init: without it the process aborts.
    done = run_ranks(ONE_RANK_STAYS_AWAY_FROM_INIT)
    assert done.output.count("INIT FAILED") == 2, done.output
    assert done.code == 0, done.output


BYTES_OF_ANY_KIND = """
import os
import sys

sys.stdout.buffer.write(b"before \\xff after\\n" + "caf\\u00e9\\n".encode())
sys.stdout.flush()
sys.exit(3 if os.environ["HOROVOD_RANK"] == "1" else 0)
"""


def test_a_failed_job_ends_with_one_sentence_and_all_output(run_ranks):
    # 14-one-sentence, 17-any-bytes, 18-home.
    done = run_ranks(BYTES_OF_ANY_KIND, HOME=os.devnull, PYTHONIOENCODING="ascii")
    assert done.code == 1
    assert "Traceback" not in done.output
    last = done.output.splitlines()[-1]
    assert last == "horovodrun: process 1 was the first to fail, with exit code 3"
    assert "[1]<stdout>:before \\ufffd after\n" in done.output
    assert "[1]<stdout>:caf\\xe9\n" in done.output


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("--check-build", 0, "[X] Gloo"),
        ("-np 3 -H localhost:2 true", 1, "horovodrun: Requested more processes (3)"),
        ("-np 1 --hostfile no-such-file true", 1, "horovodrun: [Errno 2] No such file"),
        ("-np 1 -H localhost:1,localhost:1 true", 1, "horovodrun: localhost is named twice: name"),
        ("-np 1 --hostfile empty true", 1, "horovodrun: empty names no host: write a line NAME"),
        ("-np 1 --hostfile wrong true", 1, r"line 3: 'h\\xf6st' is not a host: write NAME slots="),
        ("-np 3 -H localhost:2 --log-level DEBUG true", 1, "Traceback (most recent call last)"),
    ],
)
def test_horovodrun_says_why_it_cannot_start_a_job(tmp_path, run, options, code, said):
    # 14-one-sentence, 28-hostfile.
    (tmp_path / "empty").write_text("# nobody yet\n")
    (tmp_path / "wrong").write_bytes(b"\xef\xbb\xbflocalhost slots=1  # mine\n\nh\xf6st\n")
    done = run(str(HOROVODRUN), *options.split())
    assert done.code == code and said in done.output
    assert ("Traceback" in done.output) == ("DEBUG" in options)


ELASTIC = """
import horovod.torch as hvd

hvd.init()


@hvd.elastic.run
def train(state):
    print("TRAINED BY", hvd.size(), flush=True)


train(hvd.elastic.TorchState(batch=0))
"""


def test_an_elastic_job_runs_behind_a_proxy(run_ranks, tmp_path):
    # 15-no-proxy: without it, `Put data input KVStore server failed`.
    discovery = tmp_path / "hosts.sh"
    discovery.write_text("#!/bin/sh\necho localhost:2\n")
    discovery.chmod(0o755)
    options = ["--min-np", "2", "--host-discovery-script", str(discovery)]
    done = run_ranks(ELASTIC, *options, "--network-interface", "lo")
    assert done.code == 0, done.output
    assert done.output.count("TRAINED BY 2") == 2


SECOND_SIGNAL = """
import os
import signal
import threading

from horovod.runner.gloo_run import register_shutdown_event

event = register_shutdown_event()
notify_all, sent = threading.Condition.notify_all, []


def interrupted(self):
    if self is event._cond and not sent:  # Event.set holds its lock now
        sent.append(os.kill(os.getpid(), signal.SIGTERM))
    notify_all(self)


threading.Condition.notify_all = interrupted
os.kill(os.getpid(), signal.SIGTERM)
print("ENDED", event.is_set(), len(sent))
"""


def test_a_second_signal_does_not_hang_horovodrun(run):
    # 16-second-signal.
    assert run(sys.executable, "-c", SECOND_SIGNAL, timeout=20).output == "ENDED True 1\n"


def test_the_extension_finds_its_libraries_in_any_environment():
    # 21-runpath: without it, the library holds the path of the environment that it was built in.
    found = importlib.util.find_spec("horovod")
    library = next(Path(found.submodule_search_locations[0], "torch").glob("mpi_lib_v2*.so"))
    assert b"\0$ORIGIN/../../torch/lib:" in library.read_bytes()


RANK_THAT_LOOKS_FOR_A_SECRET = """
import os
import horovod.torch as hvd
import psutil
import torch

hvd.init()
assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="here").item() == 2
shown = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
print("RANK", hvd.rank(), os.path.basename(os.getcwd()), os.environ["TOKEN"] == "it's a secret",
      any("a secret" in line for line in shown), "HOROVOD_COMMAND" in os.environ, flush=True)
"""
SSH = """#!/bin/sh
echo "$*" >> ssh.log
while :; do
    case $1 in
        -*) shift 2 ;;
        192.0.2.7) shift ;;
        *) break ;;
    esac
done
unset TOKEN HOROVOD_COMMAND
cd /
exec sh -c "$*"
"""


def test_no_command_line_shows_the_environment(tmp_path, run_ranks):
    """25-quoted-folder, 26-host-keys, 27-private-environment, with an ssh that goes nowhere."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    variables = {"PATH": f"{ssh.parent}:{os.environ['PATH']}", "TOKEN": "it's a secret"}
    options = "-H localhost:1,192.0.2.7:1 --network-interfaces lo --disable-cache".split()
    done = run_ranks(RANK_THAT_LOOKS_FOR_A_SECRET, *options, **variables)
    assert done.code == 0, done.output
    said = sorted(re.findall("RANK .*", done.output))
    assert said == [f"RANK {rank} {tmp_path.name} True False False" for rank in (0, 1)]
    calls = (tmp_path / "ssh.log").read_text().splitlines()
    assert calls and all("StrictHostKeyChecking=accept-new" in call for call in calls)
