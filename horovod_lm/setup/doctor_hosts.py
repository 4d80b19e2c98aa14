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
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import Any

from horovod_lm.launch.hosts import (
    FORWARDED,
    checked_hosts,
    is_this_machine,
    ssh_command,
    wrong_names,
)
from horovod_lm.setup.finding import FAIL, OK, WARN, Finding
from horovod_lm.training.host_check import SECONDS_TO_CONNECT, fix_difference
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DistributedError, last_line

SECONDS_TO_ANSWER = 60  # the project may be on a network disk
SECONDS_APART = 2.0  # with clocks further apart, logs of two hosts are hard to compare
Facts = dict[str, Any]


class HostProcess:
    """A `host_check` process on a host, which answers questions in JSON.

    Args:
        config: how to log in, and what to check.
        name: of the host.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        host = next(host for host in checked_hosts(config) if host.name == name)
        variables = os.environ | config.distributed.environment | host.environment
        # Only these, because a command line is visible to every user of both hosts.
        words = ["env", *(f"{key}={variables[key]}" for key in FORWARDED if key in variables)]
        # A host with a PATH of its own has a `python` of its own.
        python = "python" if "PATH" in host.environment else sys.executable
        words += [python, "-m", "horovod_lm.training.host_check"]
        line = f"cd {shlex.quote(str(config.project_root))} && {shlex.join(words)}"
        here = is_this_machine(name)
        self._process = subprocess.Popen(
            ["sh", "-c", line] if here else ssh_command(config, name, line),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            bufsize=0,  # `select` does not see what is in a buffer
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def ask(self, question: Facts, seconds: float = SECONDS_TO_ANSWER) -> Facts:
        """Send a question and return the answer; "apart": seconds of its clock ahead of ours.

        Raises:
            DistributedError: there was no answer; the text is the reason, without the host's name.
        """
        try:
            self._stdin.write(json.dumps(question).encode() + b"\n")
            while select.select([self._stdout], [], [], seconds)[0]:
                line = self._stdout.readline()
                if not line:
                    raise BrokenPipeError
                if line.startswith(b"{"):  # a login may print a greeting first
                    answer = dict(json.loads(line))
                    return answer | {"apart": answer["time"] - time.time()}
        except BrokenPipeError:
            code = self._process.wait()
            self._errors.seek(0)
            lines = [line for line in self._errors if not line.startswith("Warning:")]
            raise DistributedError(last_line("".join(lines)) or f"exit code {code}") from None
        raise DistributedError(f"no answer for {seconds:g} s")

    def close(self) -> None:
        """End the process there and here."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=3)
        self._process.kill()
        self._process.wait()
        self._stdout.close()
        self._errors.close()


def examine_hosts(config: Config) -> Iterator[Finding]:
    """Yield the findings about the hosts in `config.distributed`, host by host.

    Raises:
        ConfigError: there are no hosts, or one is named twice.
    """
    wrong = wrong_names(config)
    for name, (message, fix) in wrong.items():
        yield Finding(name, FAIL, message, fix)
    names = [host.name for host in checked_hosts(config) if host.name not in wrong]
    with ExitStack() as stack:
        yield from _examine(
            config, [stack.enter_context(closing(HostProcess(config, name))) for name in names]
        )


def _examine(config: Config, processes: Sequence[HostProcess]) -> Iterator[Finding]:
    question = {"config": config.to_dict(), "root": str(config.project_root)}
    answers = _ask_all(processes, question)
    found: dict[str, Facts] = {}  # of the hosts that answered
    for name, answer in answers.items():
        if isinstance(answer, DistributedError):
            yield _unreachable(config, name, str(answer))
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
        if abs(ahead) > SECONDS_APART:
            yield Finding(name, WARN, message, f"on {name}: timedatectl set-ntp true")
        else:
            yield Finding(name, OK, message)
        yield from _ports(name, calls[name])


def _ask_all(
    processes: Sequence[HostProcess], question: Facts, seconds: float = SECONDS_TO_ANSWER
) -> dict[str, Facts | DistributedError]:
    def ask(process: HostProcess) -> tuple[str, Facts | DistributedError]:
        try:
            return process.name, process.ask(question, seconds)
        except DistributedError as error:
            return process.name, error

    with ThreadPoolExecutor(len(processes) or 1) as pool:
        return dict(pool.map(ask, processes))


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


def _ports(name: str, calls: Facts | DistributedError) -> Iterator[Finding]:
    if isinstance(calls, DistributedError):
        yield Finding(name, FAIL, f"ports: {calls}", "run this again")
        return
    for peer, why in calls["failed"].items():
        fix = f"let TCP through from {name} to every port of {peer}: firewall, security group"
        yield Finding(name, FAIL, f"ports: cannot connect to {peer}: {why}", fix)
    if not calls["failed"]:
        peers = ", ".join(calls["reached"]) or "no other host"
        yield Finding(name, OK, f"ports: connects to {peers}")
