"""Start a job on several hosts, and say in one sentence why it ended when it did not end well.

horovodrun names the first rank that failed and its exit code: often the rank that was the first to
notice. What its reader needs is the host and what to do there.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from horovod_lm.utils.cli import command
from horovod_lm.utils.cluster import (
    DEFAULT_HOSTFILE,
    check_names,
    checked_hosts,
    horovodrun_command,
    is_this_machine,
    ssh_command,
    write_hostfile,
)
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DistributedError

KILLED_BEHIND_SSH = 255  # what ssh says of a command there that a signal ended
LINES_KEPT = 400
SECONDS_TO_ANSWER = 4
_OF_A_RANK = re.compile(r"\[(\d+)\]<(stdout|stderr)>:(.*)")
_NO_SSH = re.compile(r"ssh not successful for host (\S+):")
_FIRST_SIGN = re.compile(r"lost another rank|another rank is gone|exit with status code")
_BLAMED = re.compile(r"horovodrun: process (\d+) was the first to fail, with exit code (-?\d+)")


def run(config: Config, command: Sequence[str], hostfile: str | Path = DEFAULT_HOSTFILE) -> None:
    """Print horovodrun's call, start it, and pass on what it says until it ends.

    Args:
        config: its `distributed` section names the hosts.
        command: what each rank runs.
        hostfile: where to write horovodrun's list of hosts.

    Raises:
        ConfigError: the hosts' names cannot be right.
        DistributedError: it did not end well; the sentence names the host.
    """
    check_names(config)
    call = horovodrun_command(config, command, write_hostfile(config, hostfile))
    print(shlex.join(call), flush=True)
    said: deque[str] = deque(maxlen=LINES_KEPT)
    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        asked = None
        try:
            for line in _pass_on(process.stdout, said):
                # The surviving ranks and horovodrun take seconds to end: time to ask meanwhile.
                if asked is None and _FIRST_SIGN.search(line):
                    asked = pool.submit(silent_hosts, config)
        finally:
            signal.signal(signal.SIGTERM, before)
        code = process.wait()
        if code:
            silent = asked.result() if asked else silent_hosts(config)
            raise DistributedError(explain(config, code, list(said), silent))


def _pass_on(lines: Iterable[str], said: deque[str]) -> Iterator[str]:
    for line in lines:
        said.append(line.rstrip("\n"))
        sys.stdout.write(line)
        sys.stdout.flush()
        yield line


def explain(config: Config, code: int, said: Sequence[str], silent: dict[str, str]) -> str:
    """Return why a job ended, naming the host: from what it said, and who still answers.

    Args:
        config: the job's.
        code: horovodrun's exit code.
        said: the last lines of its output.
        silent: the hosts that do not answer, as `silent_hosts` returns them.
    """
    return (
        _locked_out(said)
        or _lost(config, silent)
        or _failed(config, said)
        or _own_words(code, said)
    )


def silent_hosts(config: Config) -> dict[str, str]:
    """Return the hosts that do not answer ssh now, each with what ssh says about it."""
    names = [host.name for host in checked_hosts(config) if not is_this_machine(host.name)]
    if not names:
        return {}
    with ThreadPoolExecutor(len(names)) as pool:
        answers = pool.map(lambda name: _why_silent(config, name), names)
    return {name: why for name, why in zip(names, answers, strict=True) if why}


def _why_silent(config: Config, name: str) -> str:
    call = ssh_command(config, name, "true", SECONDS_TO_ANSWER)
    try:
        done = subprocess.run(
            call, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=SECONDS_TO_ANSWER + 1,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer for {SECONDS_TO_ANSWER} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def _locked_out(said: Sequence[str]) -> str:
    for number, line in enumerate(said):
        if found := _NO_SSH.match(line):
            told = [text.strip() for text in said[number + 1 :] if text.strip()]
            told = [text for text in told if not text.startswith(("Warning:", "horovodrun:"))]
            return (
                f"{found[1]} does not let ssh in ({told[0] if told else 'it does not say why'}):"
                " check distributed.ssh_user, ssh_port and ssh_identity_file, and that the key"
                f" stands in {found[1]}'s authorized_keys;"
                f" {command('horovod_lm.doctor', '--hosts', 'FILE')} looks at every host"
            )
    return ""


def _lost(config: Config, silent: dict[str, str]) -> str:
    if not silent:
        return ""
    ranks = ranks_of(config)
    names = [f"{name} ({_ranks(ranks[name])}: {why})" for name, why in silent.items()]
    return (
        f"lost {' and '.join(names)}: see to the machine and its network, then go on with --resume"
    )


def _failed(config: Config, said: Sequence[str]) -> str:
    blamed = [found for line in said if (found := _BLAMED.match(line))]
    if not blamed:
        return ""
    rank, code = map(int, blamed[-1].groups())
    host = next(name for name, ranks in ranks_of(config).items() if rank in ranks)
    if frozen := _frozen(config, said, rank):
        return frozen
    words = [found[3].strip() for line in said if (found := _OF_A_RANK.match(line))
             and int(found[1]) == rank and found[2] == "stderr" and found[3].strip()]  # fmt: skip
    errors = [text for text in words if text.startswith("error: ")]
    last = "".join(f": {text.removeprefix('error: ')}" for text in (errors or words)[-1:])
    return f"rank {rank} on {host} {_how(code)}{last}"


def _frozen(config: Config, said: Sequence[str], blamed: int) -> str:
    """Name the ranks that stood still: ended by their watchdog, or given up by all the others."""
    killed = _ranks_that_say("stood still for", said)
    survivors = _ranks_that_say("lost another rank", said)
    if blamed not in killed | survivors:
        return ""
    named = [
        f"rank {rank} on {host}"
        for host, ranks in ranks_of(config).items()
        for rank in ranks
        if rank in killed or (not killed and rank not in survivors)
    ]
    if not named:
        return ""
    return (
        f"{', '.join(named)} did not answer any more, and the machine does: see there why the"
        " process stood still, then go on with --resume"
    )


def _ranks_that_say(words: str, said: Sequence[str]) -> set[int]:
    lines = (_OF_A_RANK.match(line) for line in said)
    return {int(line[1]) for line in lines if line and words in line[3]}


def _own_words(code: int, said: Sequence[str]) -> str:
    words = [line.strip() for line in said if line.strip() and not _OF_A_RANK.match(line)]
    last = words[-1].removeprefix("horovodrun: ") if words else "it said nothing"
    return f"horovodrun ended with exit code {code}: {last}"


def ranks_of(config: Config) -> dict[str, range]:
    """Return the ranks that each host runs, in horovodrun's order."""
    ranks, first = {}, 0
    for host in checked_hosts(config):
        ranks[host.name] = range(first, first + host.slots)
        first += host.slots
    return ranks


def _ranks(numbers: range) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {numbers[0]} to {numbers[-1]}"


def _how(code: int) -> str:
    if code == KILLED_BEHIND_SSH:
        return "was killed (by somebody, or by the system when memory ran out)"
    number = -code if code < 0 else code - 128  # a local process, or a shell's word for one
    if number in {one.value for one in signal.Signals}:
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with exit code {code}"
