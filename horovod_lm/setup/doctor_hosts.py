"""Check whether several hosts can train together: `horovod_lm.setup.doctor --hosts`.

Run on the first host. It logs in to every host as horovodrun would, runs
`horovod_lm.training.host_check` there, compares the answers with the first host's, and lets every
host connect to every other one by TCP at a port that the system has chosen, as the ranks will.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from horovod_lm.launch.hosts import checked_hosts, is_this_machine, ssh_command, wrong_names
from horovod_lm.setup.finding import FAIL, OK, WARN, Finding
from horovod_lm.training.host_check import SECONDS_TO_CONNECT, fix_difference
from horovod_lm.utils.config import Config, HostConfig

SECONDS_TO_ANSWER = 60  # the project may be on a network disk
SECONDS_APART = 2.0  # with clocks further apart, logs of two hosts are hard to compare
# Variables that go to another host; horovodrun takes all. Only these, because a command line is
# visible to every user of both hosts.
FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
Facts = dict[str, Any]


class HostProcess:
    """A `host_check` process on a host, which answers questions in JSON."""

    def __init__(self, config: Config, host: HostConfig) -> None:
        self.name = host.name
        variables = os.environ | config.distributed.environment | host.environment
        words = ["env", *(f"{key}={variables[key]}" for key in FORWARDED if key in variables)]
        # A host with a PATH of its own has a `python` of its own.
        python = "python" if "PATH" in host.environment else sys.executable
        words += [python, "-m", "horovod_lm.training.host_check"]
        line = f"cd {shlex.quote(str(config.project_root))} && {shlex.join(words)}"
        here = is_this_machine(host.name)
        self._process = subprocess.Popen(
            ["sh", "-c", line] if here else ssh_command(config, host.name, line),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            bufsize=0,  # `select` does not see what is in a buffer
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def ask(self, question: Facts, seconds: float = SECONDS_TO_ANSWER) -> Facts | str:
        """Send a question; return the answer, or the reason why there is none.

        "apart" in the answer: seconds of its clock ahead of ours.
        """
        said = ""
        with suppress(BrokenPipeError):  # it has ended: its output says why
            self._stdin.write(json.dumps(question).encode() + b"\n")
        while select.select([self._stdout], [], [], seconds)[0]:
            line = self._stdout.readline().decode("utf-8", "replace")
            if not line:
                return said or f"exit code {self._process.wait()}"
            if line.startswith("{"):  # a login may print a greeting first
                answer = dict(json.loads(line))
                return answer | {"apart": answer["time"] - time.time()}
            if line.strip() and not line.startswith("Warning:"):
                said = line.strip()
        return f"no answer for {seconds:g} s"

    def close(self) -> None:
        """End the process there and here."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=3)
        self._process.kill()
        self._process.wait()
        self._stdout.close()


def examine_hosts(config: Config) -> Iterator[Finding]:
    """Yield the findings about the hosts in `config.distributed`, host by host.

    Raises:
        ConfigError: there are no hosts, or one is named twice.
    """
    wrong = wrong_names(config)
    for name, (message, fix) in wrong.items():
        yield Finding(name, FAIL, message, fix)
    hosts = [host for host in checked_hosts(config) if host.name not in wrong]
    processes = [HostProcess(config, host) for host in hosts]
    try:
        yield from _examine(config, processes)
    finally:
        for process in processes:
            process.close()


def _examine(config: Config, processes: Sequence[HostProcess]) -> Iterator[Finding]:
    question = {"config": config.to_dict(), "root": str(config.project_root)}
    found: dict[str, Facts] = {}  # of the hosts that answered
    for name, answer in _ask_all(processes, question).items():
        if isinstance(answer, str):
            yield _unreachable(config, name, answer)
        else:
            found[name] = answer
    there = [process for process in processes if process.name in found]
    peers = {n: [facts["address"], facts["port"]] for n, facts in found.items() if facts["address"]}
    calls = _ask_all(there, {"peers": peers}, SECONDS_TO_CONNECT * len(peers) + 5)
    for name, facts in found.items():
        first = next(iter(found))
        yield Finding(name, OK, f"reached, as {facts['user']}@{facts['host']}")
        for what in ("python", "torch", "horovod", "code", "data"):
            fix = fix_difference(what, name, first, config)
            yield _compare(what, name, facts[what], first, found[first][what], fix)
        yield _interface(name, facts, config.distributed.interface)
        ahead = facts["apart"]
        message = f"clock: {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
        if abs(ahead) <= SECONDS_APART:
            yield Finding(name, OK, message)
        else:
            yield Finding(name, WARN, message, f"on {name}: timedatectl set-ntp true")
        yield from _ports(name, calls[name])


def _ask_all(
    processes: Sequence[HostProcess], question: Facts, seconds: float = SECONDS_TO_ANSWER
) -> dict[str, Facts | str]:
    with ThreadPoolExecutor(len(processes) or 1) as pool:
        answers = pool.map(lambda process: process.ask(question, seconds), processes)
        return {process.name: answer for process, answer in zip(processes, answers, strict=True)}


def _unreachable(config: Config, name: str, why: str) -> Finding:
    login = shlex.join(ssh_command(config, name, "true"))
    if "Permission denied" in why:
        fix = f"add the key to {name}'s ~/.ssh/authorized_keys; this must print nothing: {login}"
    elif "Host key verification failed" in why:
        port = config.distributed.ssh_port or 22
        entry = shlex.quote(name if port == 22 else f"[{name}]:{port}")
        fix = f"if {name} was installed again, ssh-keygen -R {entry}; if not, see what answers"
    elif "No module named" in why or "No such file" in why or "can't cd" in why:
        fix = (
            f"on {name}, put the project into {config.project_root} and its environment into"
            f" {sys.prefix}, the same folders as here (make setup)"
        )
    else:
        fix = f"start sshd on {name}, check distributed.ssh_port and the network; try: {login}"
    return Finding(name, FAIL, f"does not answer: {why}", fix)


def _compare(what: str, name: str, fact: Any, first: str, wanted: Any, fix: str) -> Finding:
    if what == "data" and None in (fact, wanted):
        state = "prepared" if fact else "not prepared yet: training does it"
        return Finding(name, OK, f"data: {state}")
    if fact is None:
        return Finding(name, FAIL, f"{what}: not installed", fix)
    if fact != wanted:
        return Finding(name, FAIL, f"{what}: {fact}, but {first} has {wanted}", fix)
    return Finding(name, OK, f"{what}: {fact}")


def _interface(name: str, facts: Facts, wanted: str | None) -> Finding:
    there = ", ".join(f"{one} ({address})" for one, address in facts["interfaces"].items())
    if wanted is None:
        fix = "name the one that connects the hosts as distributed.interface"
        return Finding(name, WARN, f"interface: none is named; there are {there}", fix)
    if facts["address"] is None:
        fix = "name one in distributed.interface that every host has, or rename it there"
        message = f"interface: {wanted} does not exist or has no address; there are {there}"
        return Finding(name, FAIL, message, fix)
    return Finding(name, OK, f"interface: {wanted} is {facts['address']}")


def _ports(name: str, calls: Facts | str) -> Iterator[Finding]:
    if isinstance(calls, str):
        yield Finding(name, FAIL, f"ports: {calls}", "run this again")
        return
    for peer, why in calls["failed"].items():
        fix = f"let TCP through from {name} to every port of {peer}: firewall, security group"
        yield Finding(name, FAIL, f"ports: cannot connect to {peer}: {why}", fix)
    if not calls["failed"]:
        peers = ", ".join(calls["reached"]) or "no other host"
        yield Finding(name, OK, f"ports: connects to {peers}")
