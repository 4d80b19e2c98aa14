"""Slurm: run a command as Horovod ranks, which `srun` starts on the hosts of a job, without ssh.

    sbatch configs/jobs/slurm.sbatch configs/tiny.yaml     # the job file calls this module

    salloc --nodes=2 --ntasks-per-node=1                   # interactively
    python -m horovod_lm.launch.slurm python -m horovod_lm.train --config configs/tiny.yaml

This process runs Horovod's rendezvous server, through which the ranks find each other. srun starts
this module once for each task of the job; there it sets Horovod's variables and runs the command.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from horovod_lm.utils.cli import EXIT_INTERRUPTED, command, run_cli
from horovod_lm.utils.errors import DistributedError
from horovod_lm.utils.machine import interface_of

MODULE = "horovod_lm.launch.slurm"
AGAIN = "a job of configs/jobs/slurm.sbatch resumes when it is submitted again"
# Not --unbuffered, with which srun gives the ranks a terminal.
SRUN = ["srun", "--kill-on-bad-exit=1", "--label", "--mpi=none", "--distribution=block"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Run a command as Horovod ranks, one for each task of this Slurm job.",
    )
    parser.add_argument("--rank-on", metavar="HOSTS", help=argparse.SUPPRESS)  # srun gives it
    parser.add_argument("program", help="what each rank runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    given = parser.parse_args(argv)
    call = [given.program, *given.arguments]
    if given.rank_on is None:
        return run(call)
    os.environ.update(rank_environment(os.environ, given.rank_on.split(",")))
    try:
        os.execvp(given.program, call)
    except OSError as error:
        raise DistributedError(f"{given.program} cannot be started: {error.strerror}") from None


def run(call: Sequence[str]) -> int:
    """Run `call` on every task of this job, and wait for its end; return the exit code.

    On Ctrl-C, and on SIGUSR1, which the job file asks Slurm to send before the time limit, every
    rank saves a checkpoint and ends; the exit code is 130, because training is not complete.

    Raises:
        DistributedError: this is no Slurm job, Horovod is not installed, or a rank failed.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise DistributedError(
            "this is not a Slurm job: submit one with sbatch configs/jobs/slurm.sbatch, or begin"
            " one with salloc --nodes=2 --ntasks-per-node=1"
        )
    try:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer
    except ImportError:
        install = command("horovod_lm.setup.install_horovod")
        raise DistributedError(f"Horovod is not installed: run {install}") from None
    job = os.environ["SLURM_JOB_ID"]
    list_hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    hosts = subprocess.check_output(list_hosts, text=True).split()
    slots = tasks_per_node(os.environ["SLURM_TASKS_PER_NODE"])
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    if gpus > slots[0]:
        print(f"note: each host uses {slots[0]} of {gpus} GPUs: --ntasks-per-node={gpus} uses all")
    plan = ",".join(f"{host}:{tasks}" for host, tasks in zip(hosts, slots, strict=True))
    rendezvous = RendezvousServer()
    variables = {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": route(hosts)[0],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(rendezvous.start()),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "PYTHONUNBUFFERED": "1",
    }
    if "SLURM_CPUS_PER_TASK" in os.environ:  # since 22.05, srun reads another name
        variables["SRUN_CPUS_PER_TASK"] = os.environ["SLURM_CPUS_PER_TASK"]
    rendezvous.init(get_host_assignments(parse_hosts(plan), sum(slots)))
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        if number == signal.SIGUSR1:
            print("the time limit is near: every rank saves a checkpoint and ends", flush=True)
        if number != signal.SIGTERM:  # scancel's, which Slurm sends to the ranks as well
            subprocess.run(["scancel", "--quiet", "--signal=TERM", job])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    code = subprocess.Popen(
        [*SRUN, f"--ntasks={sum(slots)}", sys.executable, "-m", MODULE]
        + ["--rank-on", ",".join(hosts), *call],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # on Ctrl-C, srun would kill the ranks
    ).wait()
    if signals:
        print(f"stopped before the end: {AGAIN}", flush=True)
        return EXIT_INTERRUPTED
    if code:
        # Not the code, which is the highest of all ranks.
        raise DistributedError(f"a rank failed: the first 'srun: error' above names it; {AGAIN}")
    return 0


def rank_environment(task: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """Return the environment of one rank: that of its task, as srun has set it, and Horovod's."""
    node, local_rank = int(task["SLURM_NODEID"]), int(task["SLURM_LOCALID"])
    tasks = tasks_per_node(task["SLURM_STEP_TASKS_PER_NODE"])
    peers = [other for other, count in enumerate(tasks) if count > local_rank]
    interface = route(hosts)[1]
    variables = {
        "HOROVOD_HOSTNAME": task["SLURMD_NODENAME"],
        "HOROVOD_RANK": task["SLURM_PROCID"],
        "HOROVOD_SIZE": sum(tasks),
        "HOROVOD_LOCAL_RANK": local_rank,
        "HOROVOD_LOCAL_SIZE": tasks[node],
        "HOROVOD_CROSS_RANK": peers.index(node),
        "HOROVOD_CROSS_SIZE": len(peers),
    }
    defaults = {
        "HOROVOD_GLOO_IFACE": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": max(1, int(task["SLURM_CPUS_ON_NODE"]) // tasks[node]),
    }
    return {name: str(value) for name, value in {**defaults, **task, **variables}.items()}


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each host: [2, 2, 2, 1] for Slurm's "2(x3),1"."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def route(hosts: Sequence[str]) -> tuple[str, str]:
    """Return this host's address and interface on the way to the other hosts of the job.

    Raises:
        DistributedError: this host cannot look up another one's name.
    """
    me = os.environ.get("SLURMD_NODENAME", platform.node().partition(".")[0])
    name = next((host for host in hosts if host != me), "127.0.0.1")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
            trial.connect((name, 9))  # of a datagram socket: nothing is sent
            address = trial.getsockname()[0]
    except OSError as error:
        raise DistributedError(f"{me} does not find {name}: {error}") from None
    return address, interface_of(address)


if __name__ == "__main__":
    run_cli(main)
