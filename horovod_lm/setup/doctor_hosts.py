"""Say whether several hosts can train together, and how to mend it where they cannot.

    python -m horovod_lm.setup.doctor --hosts configs/cluster.yaml

Started on the first host. It logs in to every host as horovodrun would, lets each look at itself
(`python -m horovod_lm.training.host_check` there), compares the answers with the first host's,
and lets every host call every other one by a TCP port of its own choice, as the ranks will.
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
from typing import Any

from horovod_lm.launch.hosts import (
    FORWARDED,
    checked_hosts,
    is_this_machine,
    ssh_command,
    unknown_hosts,
)
from horovod_lm.setup.finding import FAIL, OK, WARN, Finding
from horovod_lm.training.host_check import SECONDS_TO_CONNECT, cure
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DistributedError

SECONDS_TO_LOOK = 60  # a folder on a network's disk, and Python from there
SECONDS_APART = 2.0  # clocks further apart make two hosts' logs hard to read side by side
Facts = dict[str, Any]


class Visit:
    """A process on a host that looks at it and answers questions, one line of JSON each.

    Args:
        config: how to log in, and what to look at.
        name: the host's.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        host = next(host for host in checked_hosts(config) if host.name == name)
        variables = {key: os.environ[key] for key in FORWARDED if key in os.environ}
        variables |= config.distributed.environment | host.environment
        words = ["env", *(f"{key}={value}" for key, value in variables.items())]
        # As `python` stands for on that PATH, where the host has one of its own.
        python = "python" if "PATH" in host.environment else sys.executable
        words += [python, "-m", "horovod_lm.training.host_check"]
        line = f"cd {shlex.quote(str(config.project_root))} && {shlex.join(words)}"
        here = is_this_machine(name)
        self._process = subprocess.Popen(
            ["sh", "-c", line] if here else ssh_command(config, name, line),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def ask(self, question: dict[str, Any], seconds: float = SECONDS_TO_LOOK) -> Facts:
        """Send a question and return the answer.

        Raises:
            DistributedError: none came; the text is why, without the host's name.
        """
        try:
            self._stdin.write(json.dumps(question).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise DistributedError(self._why_it_ended()) from None
        while select.select([self._stdout], [], [], seconds)[0]:
            line = self._stdout.readline()
            if not line:
                raise DistributedError(self._why_it_ended())
            if line.startswith(b"{"):  # a login may print a greeting first
                return dict(json.loads(line))
        raise DistributedError(f"no answer for {seconds:g} s")

    def close(self) -> None:
        """End the process there and here."""
        try:
            self._stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._errors.close()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if not line.startswith("Warning:")]
        lines = [line for line in lines if line]
        return lines[-1] if lines else f"exit code {code}"


def examine_hosts(config: Config) -> Iterator[Finding]:
    """Look at every host of a configuration; findings come host by host.

    Args:
        config: its `distributed` section names the hosts.

    Raises:
        ConfigError: there are no hosts, or one stands there twice.
    """
    unknown = unknown_hosts(config)
    for name in unknown:
        cure = f"correct it in distributed.hosts, or add a line 'ADDRESS {name}' to /etc/hosts"
        yield Finding(name, FAIL, "has no address known here", cure)
    known = [host.name for host in checked_hosts(config) if host.name not in unknown]
    here = [name for name in known if is_this_machine(name)]
    for name in here[1:]:
        cure = f"give {name} its own address in this machine's /etc/hosts"
        yield Finding(name, FAIL, f"means this machine here, as {here[0]} does", cure)
    names = [name for name in known if name not in here[1:]]
    visits = [Visit(config, name) for name in names]
    try:
        yield from _examine(config, visits)
    finally:
        for visit in visits:
            visit.close()


def _examine(config: Config, visits: Sequence[Visit]) -> Iterator[Finding]:
    question = {"config": config.to_dict(), "root": str(config.project_root)}
    answers = _ask_all(visits, question)
    found: dict[str, Facts] = {}  # of the hosts that answered
    for name, answer in answers.items():
        if isinstance(answer, DistributedError):
            yield _unreachable(config, name, str(answer))
        else:
            found[name] = answer
    if not found:
        return
    there = [visit for visit in visits if visit.name in found]
    peers = {n: [facts["address"], facts["port"]] for n, facts in found.items() if facts["address"]}
    calls = _ask_all(there, {"peers": peers}, SECONDS_TO_CONNECT * len(peers) + 5)
    first = there[0].name
    for visit in there:
        name, facts = visit.name, found[visit.name]
        yield Finding(name, OK, f"reached, as {facts['user']}@{facts['host']}")
        yield from compare(name, facts, first, found[first], config)
        yield _clock(visit)
        yield from _ports(name, calls[name])


def _ask_all(
    visits: Sequence[Visit], question: dict[str, Any], seconds: float = SECONDS_TO_LOOK
) -> dict[str, Facts | DistributedError]:
    def ask(visit: Visit) -> Facts | DistributedError:
        try:
            return visit.ask(question, seconds)
        except DistributedError as error:
            return error

    if not visits:
        return {}
    with ThreadPoolExecutor(len(visits)) as pool:
        answers = pool.map(ask, visits)
    return {visit.name: answer for visit, answer in zip(visits, answers, strict=True)}


def _unreachable(config: Config, name: str, why: str) -> Finding:
    login = shlex.join(ssh_command(config, name, "true"))
    if "Permission denied" in why:
        cure = f"put the key into {name}'s ~/.ssh/authorized_keys; this must say nothing: {login}"
    elif "No module named" in why or "No such file" in why or "can't cd" in why:
        cure = (
            f"on {name}, put the project into {config.project_root} and its environment into"
            f" {sys.prefix}, the same folders as here (make setup)"
        )
    else:
        cure = f"start sshd on {name}, check distributed.ssh_port and the network; try: {login}"
    return Finding(name, FAIL, f"cannot be asked: {why}", cure)


def compare(
    name: str, facts: Facts, first: str, wanted: Facts, config: Config
) -> Iterator[Finding]:
    """Compare what a host found on itself with what the first host found."""
    for what in ("python", "torch", "horovod", "code"):
        yield _same(what, name, facts, first, wanted, cure(what, name, first, config))
    if facts["data"] is None or wanted["data"] is None:
        state = "not prepared yet: training does it" if facts["data"] is None else "prepared"
        yield Finding(name, OK, f"data: {state}")
    else:
        yield _same("data", name, facts, first, wanted, cure("data", name, first, config))
    yield _interface(name, facts, config.distributed.interface)


def _same(what: str, name: str, facts: Facts, first: str, wanted: Facts, mend: str) -> Finding:
    if facts[what] is None:
        return Finding(name, FAIL, f"{what}: not installed", mend)
    if facts[what] != wanted[what]:
        return Finding(name, FAIL, f"{what}: {facts[what]}, but {first} has {wanted[what]}", mend)
    return Finding(name, OK, f"{what}: {facts[what]}")


def _interface(name: str, facts: Facts, wanted: str | None) -> Finding:
    there = ", ".join(f"{one} ({address})" for one, address in facts["interfaces"].items())
    if wanted is None:
        cure = "name the one that joins the hosts as distributed.interface"
        return Finding(name, WARN, f"interface: none is named; there are {there}", cure)
    if facts["address"] is None:
        cure = "name one in distributed.interface that every host has, or rename it there"
        says = f"interface: {wanted} is not there or has no address; there are {there}"
        return Finding(name, FAIL, says, cure)
    return Finding(name, OK, f"interface: {wanted} is {facts['address']}")


def _clock(visit: Visit) -> Finding:
    asked = time.time()
    try:
        theirs = visit.ask({"time": True}, seconds=10)["time"]
    except DistributedError as error:
        return Finding(visit.name, FAIL, f"clock: {error}", "run this again")
    answered = time.time()
    apart = theirs - (asked + answered) / 2
    says = f"clock: {abs(apart):.1f} s {'ahead' if apart > 0 else 'behind'}"
    if abs(apart) > SECONDS_APART + (answered - asked) / 2:
        return Finding(visit.name, WARN, says, f"on {visit.name}: timedatectl set-ntp true")
    return Finding(visit.name, OK, says)


def _ports(name: str, calls: Facts | DistributedError) -> Iterator[Finding]:
    if isinstance(calls, DistributedError):
        yield Finding(name, FAIL, f"ports: {calls}", "run this again")
        return
    for peer, why in calls["failed"].items():
        cure = f"let TCP through from {name} to every port of {peer}: firewall, security group"
        yield Finding(name, FAIL, f"ports: cannot call {peer}: {why}", cure)
    if not calls["failed"]:
        yield Finding(name, OK, f"ports: calls {', '.join(calls['reached']) or 'nobody else'}")
