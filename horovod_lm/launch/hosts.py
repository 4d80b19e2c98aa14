"""Several hosts: write horovodrun's hostfile and command, start the job, name a lost host.

    python -m horovod_lm.launch.hosts --config configs/cluster.yaml

horovodrun fails with an IndexError if its hostfile has a comment or a blank line. Therefore the
hosts are listed in the YAML file, and the hostfile is generated.
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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from horovod_lm.utils.cli import add_config_arguments, command, program, run_cli
from horovod_lm.utils.config import Config, HostConfig, load_config
from horovod_lm.utils.errors import ConfigError, DistributedError, last_line

DEFAULT_HOSTFILE = "runs/hostfile"
# What our own ssh takes to another host; horovodrun takes the whole environment.
FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
# Variables that horovodrun does not pass to other hosts (horovod/runner/common/util/env.py).
_NOT_PASSED_ON = re.compile("BASH_FUNC_.*|OLDPWD|.*CUDA_VISIBLE_DEVICES|_HOROVOD_SECRET_KEY")
SSH_TIMEOUT = 4  # seconds
_RANK_LINE = re.compile(r"\[(\d+)\]<(?:stdout|stderr)>:(.*)")
_LOST_RANK = "lost another rank"  # the error of a rank whose connections have closed
_WATCHDOG = "stood still for"  # the message of the watchdog that killed its rank
_FIRST_TO_FAIL = re.compile(
    r"horovodrun: process (\d+) was the first to fail, with exit code (-?\d+)"
)


def write_hostfile(config: Config, path: str | Path) -> Path:
    """Write horovodrun's hostfile, a line `name slots=N` per host, and return its path.

    Args:
        config: its `distributed` section names the hosts.
        path: where to write it; a relative path starts at the project root.

    Raises:
        ConfigError: the hosts are not valid, or the file cannot be written.
    """
    path = config.resolve(path)
    text = "".join(f"{host.name} slots={host.slots}\n" for host in checked_hosts(config))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the hostfile {path} cannot be written: {error.strerror}") from None
    return path


def horovodrun_command(
    config: Config, command: Sequence[str], hostfile: str | Path = DEFAULT_HOSTFILE
) -> list[str]:
    """Return the horovodrun command that starts `command` on every slot of every host.

    Args:
        config: its `distributed` section names hosts, interface, and ssh's port and key.
        command: what each rank runs, for example `["python", "-m", "horovod_lm.train"]`.
        hostfile: what `write_hostfile` wrote; a relative path starts at the project root.

    Raises:
        ConfigError: the hosts are not valid, or the command is empty.
    """
    if not command:
        raise ConfigError("horovodrun needs a command to run on each rank")
    settings = config.distributed
    # With fewer ranks than slots, horovodrun would still start one process per slot.
    ranks = sum(host.slots for host in checked_hosts(config))
    passed_on: list[str] = []
    of_ranks: list[str] = []
    for name, value in settings.environment.items():
        (of_ranks if _NOT_PASSED_ON.match(name) else passed_on).append(f"{name}={value}")
    call = ["env", *passed_on] if passed_on else []
    # Without --disable-cache, horovodrun does not check ssh again for an hour.
    call += [program("horovodrun"), "-np", str(ranks), "--disable-cache"]
    call += ["--hostfile", str(config.resolve(hostfile))]
    if settings.interface:
        call += ["--network-interfaces", settings.interface]
    if settings.ssh_port:
        call += ["--ssh-port", str(settings.ssh_port)]
    if settings.ssh_identity_file:
        key = shlex.quote(str(config.resolve(settings.ssh_identity_file)))
        # horovodrun has no option for ssh's user and rejects user@host, but it inserts the key into
        # ssh's command line without quotes (horovod/runner/util/remote.py).
        user = f" -l {settings.ssh_user}" if settings.ssh_user else ""
        call += ["--ssh-identity-file", key + user]
    command = _with_own_environment(settings.hosts, command)
    return [*call, *(["env", *of_ranks] if of_ranks else []), *command]


def _with_own_environment(hosts: Sequence[HostConfig], command: Sequence[str]) -> list[str]:
    """Return `command` in a shell that first sets the variables of its own host."""
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
    """Return the ssh command that runs a shell line on a host, with the options of horovodrun.

    Args:
        config: its `distributed` section says how to log in.
        host: the name of the host.
        command: a line for the host's shell.
        seconds: limit for connecting.
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
        ConfigError: there are none, or a name is listed twice.
    """
    hosts = config.distributed.hosts
    if not hosts:
        raise ConfigError(
            "distributed.hosts is empty: list the hosts there, as configs/cluster.yaml does"
        )
    name, times = Counter(host.name for host in hosts).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"distributed.hosts names {name} {times} times: name it once, with the sum of its slots"
        )
    return hosts


def unknown_hosts(config: Config) -> list[str]:
    """Return the hosts whose name this machine cannot resolve to an address."""

    def resolves(name: str) -> bool:
        try:
            return bool(socket.getaddrinfo(name, None))
        except (OSError, UnicodeError):
            return False

    return [host.name for host in checked_hosts(config) if not resolves(host.name)]


def check_names(config: Config) -> None:
    """Check that every host has an address, and that at most one is this machine.

    Raises:
        ConfigError: a host has no address, or horovodrun would start another host's ranks here.
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
            f"{' and '.join(here)} are both this machine ({here[-1]} has the address {address}"
            " here): correct their addresses in /etc/hosts, or name the machine once with all its"
            " slots"
        )


def is_this_machine(name: str) -> bool:
    """Return whether a host's name resolves to an address of this machine."""
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return False
    mine = {one.address for all_of in psutil.net_if_addrs().values() for one in all_of}
    return address in mine or address.startswith("127.")


def run(config: Config, command: Sequence[str], hostfile: str | Path = DEFAULT_HOSTFILE) -> None:
    """Print the horovodrun command, run it, and show its output.

    Args:
        config: its `distributed` section names the hosts.
        command: what each rank runs.
        hostfile: where to write the hostfile.

    Raises:
        ConfigError: the hosts' names cannot be right.
        DistributedError: the job failed; the sentence names the host.
    """
    check_names(config)
    call = horovodrun_command(config, command, write_hostfile(config, hostfile))
    print(shlex.join(call), flush=True)
    lines: deque[str] = deque(maxlen=400)
    silent = None
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            for line in process.stdout or []:
                lines.append(line)
                print(line, end="", flush=True)
                if silent is None and _LOST_RANK in line:
                    silent = silent_hosts(config)  # while horovodrun ends the other ranks
        finally:
            signal.signal(signal.SIGTERM, before)
    if process.returncode:
        silent = silent_hosts(config) if silent is None else silent
        raise DistributedError(explain(config, lines, silent))


def silent_hosts(config: Config) -> dict[str, str]:
    """Return the hosts on which ssh cannot run a command now, with its last line for each."""

    def problem(name: str) -> str:
        call = ssh_command(config, name, "true", SSH_TIMEOUT)
        try:
            done = subprocess.run(
                call, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=SSH_TIMEOUT + 1,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no answer for {SSH_TIMEOUT} s"
        return (last_line(done.stderr) or "it does not say why") if done.returncode else ""

    names = [host.name for host in checked_hosts(config) if not is_this_machine(host.name)]
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        problems = zip(names, pool.map(problem, names), strict=True)
        return {name: text for name, text in problems if text}


def explain(config: Config, lines: Iterable[str], silent: Mapping[str, str]) -> str:
    """Return why a job failed: hosts that cannot be reached, or the rank that hung or failed.

    Args:
        config: its `distributed` section names the hosts.
        lines: the last lines of horovodrun's output.
        silent: what `silent_hosts` returned.
    """
    if silent:
        return (
            f"cannot reach {' and '.join(f'{name} ({why})' for name, why in silent.items())}:"
            " check the machine, its network, and distributed.ssh_user, ssh_port and"
            f" ssh_identity_file ({command('horovod_lm.setup.doctor', '--hosts', 'FILE')} checks"
            " every host), then resume with --resume"
        )
    lines = list(lines)
    failed = [found for line in lines if (found := _FIRST_TO_FAIL.match(line))]
    if not failed:
        return f"horovodrun failed: {last_line(''.join(lines)).removeprefix('horovodrun: ')}"
    rank, code = map(int, failed[-1].groups())
    host_of = [host.name for host in checked_hosts(config) for _ in range(host.slots)]  # by rank
    of_ranks = [found for line in lines if (found := _RANK_LINE.match(line))]
    # A rank that hangs prints nothing: its watchdog kills it, or the others lose it.
    killed = {int(found[1]) for found in of_ranks if _WATCHDOG in found[2]}
    survivors = {int(found[1]) for found in of_ranks if _LOST_RANK in found[2]}
    hung = killed or set(range(len(host_of))) - survivors
    if rank in killed | survivors and hung:
        names = ", ".join(f"rank {rank} on {host_of[rank]}" for rank in sorted(hung))
        return (
            f"{names} stopped responding, but the machine answers: find out there why the process"
            " hung, then resume with --resume"
        )
    # ssh has exit code 255 for a command that a signal ended.
    why = " (killed, for example when memory ran out)" if not 0 < code < 128 else ""
    return f"rank {rank} on {host_of[rank]} failed first, with exit code {code}{why}: see above"


def training_command(arguments: argparse.Namespace, *options: str) -> list[str]:
    """Return the command of training with the --config and --set of a parsed command line."""
    words = [program("python"), "-m", "horovod_lm.train", *options, "--config", arguments.config]
    return words + [word for override in arguments.overrides for word in ("--set", override)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.launch.hosts",
        description="Write horovodrun's hostfile and print the command that starts a job on several"
        " hosts. With --run, also start it.",
    )
    add_config_arguments(parser, default="configs/cluster.yaml")
    parser.add_argument(
        "--hostfile", default=DEFAULT_HOSTFILE, metavar="PATH",
        help="where to write it (default: %(default)s in the project's folder)",
    )  # fmt: skip
    parser.add_argument(
        "--run", action="store_true", help="start the job; if it fails, name the host or rank"
    )
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="after --: what to run instead of training"
    )
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    words = arguments.command or training_command(arguments)
    if arguments.run:
        run(config, words, arguments.hostfile)
        return 0
    for name in unknown_hosts(config):
        print(f"warning: {name} has no address known here: see distributed.hosts", file=sys.stderr)
    hostfile = write_hostfile(config, arguments.hostfile)
    print(shlex.join(horovodrun_command(config, words, hostfile)))
    return 0


if __name__ == "__main__":
    run_cli(main)
