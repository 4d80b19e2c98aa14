"""Several hosts: write horovodrun's hostfile and command, start the job, and say why it failed.

    python -m horovod_lm.launch.hosts --config configs/cluster.yaml

horovodrun reads its hostfile word by word: a comment or a blank line ends it with an IndexError.
So the hosts are listed in the YAML file, which may hold comments, and the hostfile is generated.

horovodrun names the first rank that failed and its exit code: often the rank that was the first to
notice. The message of `run` names the host and what to do there.
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from horovod_lm.utils.cli import add_config_arguments, command, program, run_cli
from horovod_lm.utils.config import Config, HostConfig, load_config
from horovod_lm.utils.errors import ConfigError, DistributedError

DEFAULT_HOSTFILE = "runs/hostfile"
# What our own ssh takes along to another host; horovodrun takes the whole environment.
FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
# Variables that horovodrun keeps from other hosts (horovod/runner/common/util/env.py).
_NOT_PASSED_ON = re.compile("BASH_FUNC_.*|OLDPWD|.*CUDA_VISIBLE_DEVICES|_HOROVOD_SECRET_KEY")
KILLED_BEHIND_SSH = 255  # what ssh says of a command there that a signal ended
LINES_KEPT = 400
SECONDS_TO_ANSWER = 4
_OF_A_RANK = re.compile(r"\[(\d+)\]<(stdout|stderr)>:(.*)")
_NO_SSH = re.compile(r"ssh not successful for host (\S+):")
_FIRST_SIGN = re.compile(r"lost another rank|another rank is gone|exit with status code")
_BLAMED = re.compile(r"horovodrun: process (\d+) was the first to fail, with exit code (-?\d+)")


def hostfile_text(config: Config) -> str:
    """Return the content of horovodrun's hostfile: one line `name slots=N` per host, nothing else.

    Raises:
        ConfigError: there are no hosts, or one stands there twice.
    """
    return "".join(f"{host.name} slots={host.slots}\n" for host in checked_hosts(config))


def write_hostfile(config: Config, path: str | Path) -> Path:
    """Write the hostfile and return its path; a relative one starts at the project root.

    Raises:
        ConfigError: the hosts are not valid, or the file cannot be written.
    """
    text, path = hostfile_text(config), config.resolve(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the hostfile {path} cannot be written: {error.strerror}") from None
    return path


def horovodrun_command(
    config: Config, command: Sequence[str], hostfile: str | Path = DEFAULT_HOSTFILE
) -> list[str]:
    """Return the call of horovodrun that starts `command` on every slot of every host.

    Args:
        config: its `distributed` section names hosts, interface, and ssh's port and key.
        command: what each rank runs, for example `["python", "-m", "horovod_lm.train"]`.
        hostfile: what `write_hostfile` wrote; a relative path starts at the project root.

    Returns:
        The words, `horovodrun` or its path first, for `subprocess.run` or `shlex.join`.

    Raises:
        ConfigError: the hosts are not valid, or the command is empty.
    """
    if not command:
        raise ConfigError("horovodrun needs a command to run on each rank")
    settings = config.distributed
    # Always all slots: with fewer, horovodrun would still start one process per slot.
    ranks = sum(host.slots for host in checked_hosts(config))
    here, there = _split_environment(settings.environment)
    call = ["env", *here] if here else []
    # Else horovodrun believes for an hour that ssh works where it once did.
    call += [program("horovodrun"), "-np", str(ranks), "--disable-cache"]
    call += ["--hostfile", str(config.resolve(hostfile))]
    if settings.interface:
        call += ["--network-interfaces", settings.interface]
    if settings.ssh_port:
        call += ["--ssh-port", str(settings.ssh_port)]
    if settings.ssh_identity_file:
        call += ["--ssh-identity-file", _key_and_user(config, settings.ssh_identity_file)]
    command = _with_own_environment(settings.hosts, command)
    return [*call, *(["env", *there] if there else []), *command]


def _key_and_user(config: Config, identity_file: str) -> str:
    # horovodrun has no option for ssh's user and refuses user@host, but puts what it is told of the
    # key into ssh's command line as it stands (horovod/runner/util/remote.py).
    key = shlex.quote(str(config.resolve(identity_file)))
    user = config.distributed.ssh_user
    return f"{key} -l {user}" if user else key


def _split_environment(environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return what horovodrun gets and passes on, and what each rank must set for itself."""
    here = [f"{k}={v}" for k, v in environment.items() if not _NOT_PASSED_ON.match(k)]
    there = [f"{k}={v}" for k, v in environment.items() if _NOT_PASSED_ON.match(k)]
    return here, there


def _with_own_environment(hosts: Sequence[HostConfig], command: Sequence[str]) -> list[str]:
    """Return `command`, in a shell that first sets what its host alone has."""
    cases = [
        f"{host.name}) export {shlex.join(f'{k}={v}' for k, v in host.environment.items())};;"
        for host in hosts
        if host.environment
    ]
    if not cases:
        return list(command)
    script = f'case $HOROVOD_HOSTNAME in {" ".join(cases)} esac; exec "$@"'
    return ["sh", "-c", script, "sh", *command]


def ssh_command(config: Config, host: str, command: str, seconds: int = 5) -> list[str]:
    """Return the call of ssh that runs a line of shell on a host, as horovodrun would.

    Args:
        config: its `distributed` section says how to log in.
        host: the name of the host.
        command: a line for the host's shell.
        seconds: to wait for a connection.
    """
    settings = config.distributed
    call = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
    call += ["-o", f"ConnectTimeout={seconds}"]
    if settings.ssh_port:
        call += ["-p", str(settings.ssh_port)]
    if settings.ssh_identity_file:
        call += ["-i", str(config.resolve(settings.ssh_identity_file))]
    if settings.ssh_user:
        call += ["-l", settings.ssh_user]
    return [*call, host, command]


def checked_hosts(config: Config) -> list[HostConfig]:
    """Return the configuration's hosts.

    Raises:
        ConfigError: there are none, or one stands there twice.
    """
    hosts = config.distributed.hosts
    if not hosts:
        raise ConfigError(
            "distributed.hosts is empty: name the machines there, as configs/cluster.yaml does"
        )
    name, times = Counter(host.name for host in hosts).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"distributed.hosts names {name} {times} times: name it once, with the sum of its slots"
        )
    return hosts


def unknown_hosts(config: Config) -> list[str]:
    """Return the names of hosts that this machine cannot turn into an address."""
    return [host.name for host in checked_hosts(config) if not _has_address(host.name)]


def check_names(config: Config) -> None:
    """Make sure that each host has an address here, and that no two of them are this machine.

    Raises:
        ConfigError: horovodrun would look for a host that is not there, or start its ranks here.
    """
    for name in unknown_hosts(config):
        raise ConfigError(
            f"{name} has no address known here: correct it in distributed.hosts, or add a line"
            f" 'ADDRESS {name}' to /etc/hosts"
        )
    here = [host.name for host in checked_hosts(config) if is_this_machine(host.name)]
    if len(here) > 1:
        address = socket.gethostbyname(here[-1])
        raise ConfigError(
            f"{' and '.join(here)} both mean this machine ({here[-1]} is {address} here):"
            " correct their addresses in /etc/hosts, or name the machine once with all its slots"
        )


def is_this_machine(name: str) -> bool:
    """Return whether a host's name means an address of this machine, as horovodrun sees it."""
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return False
    mine = {one.address for all_of in psutil.net_if_addrs().values() for one in all_of}
    return address in mine or address.startswith("127.")


def _has_address(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


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
            for line in _pass_on(process.stdout or [], said):
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
                f" {command('horovod_lm.setup.doctor', '--hosts', 'FILE')} looks at every host"
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


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.launch.hosts",
        description="Write horovodrun's hostfile and print the call that starts a job on several "
        "hosts. Nothing is started without --run.",
    )
    add_config_arguments(parser, default="configs/cluster.yaml")
    parser.add_argument(
        "--hostfile",
        default=DEFAULT_HOSTFILE,
        metavar="PATH",
        help=f"where to write it (default: {DEFAULT_HOSTFILE} in the project's folder)",
    )
    parser.add_argument(
        "--run", action="store_true", help="start it too, and explain how it ended if not well"
    )
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="after --: what to run instead of training"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    training = [program("python"), "-m", "horovod_lm.train", "--config", arguments.config]
    for override in arguments.overrides:
        training += ["--set", override]
    hostfile = write_hostfile(config, arguments.hostfile)
    command = arguments.command or training
    if arguments.run:
        run(config, command, hostfile)
        return 0
    for name in unknown_hosts(config):
        print(
            f"warning: {name} has no address known here: check distributed.hosts", file=sys.stderr
        )
    print(shlex.join(horovodrun_command(config, command, hostfile)))
    return 0


if __name__ == "__main__":
    run_cli(main)
