"""Several hosts: write horovodrun's hostfile and command, start the job, name a lost host.

    python -m horovod_lm.launch.hosts --config configs/cluster.yaml

The hosts are listed in the YAML file, and the hostfile is generated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from horovod_lm.utils import cli
from horovod_lm.utils.cli import add_config_arguments, program, run_cli
from horovod_lm.utils.config import Config, HostConfig, load_config
from horovod_lm.utils.errors import ConfigError, DistributedError, how_it_ended, last_line

DEFAULT_HOSTFILE = "runs/hostfile"
_READ_ENVIRONMENT = (
    'test -r "$0" || { echo "error: $HOROVOD_HOSTNAME lacks $0: copy it from the first host" >&2;'
    ' exit 2; }; . "$0"; exec "$@"'
)
SSH_TIMEOUT = 4  # seconds
_RANK_LINE = re.compile(r"\[(\d+)\]<(?:stdout|stderr)>:(.*)")
_LOST_RANK = "lost another rank"  # the error of a rank whose connections have closed
_WATCHDOG = "stood still for"  # the message of the watchdog that killed its rank
_FIRST_TO_FAIL = re.compile(r"horovodrun: process (\d+) was the first to fail, .* code (-?\d+)")


def write_hostfile(config: Config, path: str | Path) -> Path:
    """Write horovodrun's hostfile, a line `name slots=N` per host, and return its path.

    The configuration's environment variables, if any, go into a second file, `PATH.environment`.
    A relative path starts at the project root.

    Raises:
        ConfigError: the hosts are not valid, or the file cannot be written.
    """
    path = config.resolve(path)
    hosts = checked_hosts(config)
    replace_file(path, "".join(f"{host.name} slots={host.slots}\n" for host in hosts))
    write_environment(config, path)
    return path


def replace_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file atomically; its folder is created.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(mode)
        temporary.chmod(mode)
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def write_environment(config: Config, hosts_file: Path) -> None:
    """Write the configuration's environment variables into a file beside a file of hosts.

    Each rank reads it, and only its owner can. In the command that is printed, every user of the
    host would see them.
    """
    script = _exports(config.distributed.environment)
    for host in config.distributed.hosts:
        if exports := _exports(host.environment):
            script += f'[ "$HOROVOD_HOSTNAME" != {host.name} ] || {exports}'
    path = environment_file(hosts_file)
    if script:
        replace_file(path, script, 0o600)
    else:
        path.unlink(missing_ok=True)


def _exports(variables: Mapping[str, str]) -> str:
    words = shlex.join(f"{name}={value}" for name, value in variables.items())
    return f"export {words}\n" if words else ""


def environment_file(hosts_file: Path) -> Path:
    """Return the path of the environment variables that belong to a file of hosts."""
    return hosts_file.with_name(f"{hosts_file.name}.environment")


def with_environment(config: Config, hosts_file: Path, command: Sequence[str]) -> list[str]:
    """Return `command` in a shell that first sets the variables that `write_environment` wrote."""
    settings = config.distributed
    if not settings.environment and not any(host.environment for host in settings.hosts):
        return list(command)
    return ["sh", "-c", _READ_ENVIRONMENT, str(environment_file(hosts_file)), *command]


def horovodrun_command(
    config: Config, command: Sequence[str], hostfile: str | Path = DEFAULT_HOSTFILE
) -> list[str]:
    """Return the horovodrun command that starts `command` on every slot of every host.

    Args:
        config: its `distributed` section names hosts, interface, and ssh's port and key.
        command: what each rank runs, for example `["python", "-m", "horovod_lm.train"]`.
        hostfile: what `write_hostfile` wrote.

    Raises:
        ConfigError: the hosts are not valid.
    """
    settings = config.distributed
    # With fewer ranks than slots, horovodrun would still start one process per slot.
    ranks = sum(host.slots for host in checked_hosts(config))
    hostfile = config.resolve(hostfile)
    # Without --disable-cache, horovodrun does not check ssh again for an hour.
    call = [program("horovodrun"), "-np", str(ranks), "--disable-cache"]
    call += ["--hostfile", str(hostfile)]
    if settings.interface:
        call += ["--network-interfaces", settings.interface]
    return [*call, *ssh_options(config), *with_environment(config, hostfile, command)]


def ssh_options(config: Config) -> list[str]:
    """Return horovodrun's options for ssh: port, private key and user."""
    settings = config.distributed
    options = ["--ssh-port", str(settings.ssh_port)] if settings.ssh_port else []
    if settings.ssh_identity_file:
        key = shlex.quote(str(config.resolve(settings.ssh_identity_file)))
        # horovodrun has no option for ssh's user and rejects user@host, but it inserts the key into
        # ssh's command line without quotes (horovod/runner/util/remote.py).
        user = f" -l {settings.ssh_user}" if settings.ssh_user else ""
        options += ["--ssh-identity-file", key + user]
    return options


def ssh_command(config: Config, host: str, command: str, seconds: int = 5) -> list[str]:
    """Return the ssh command that runs a shell line on a host, connecting within `seconds`.

    A new host's key is accepted, one that has changed is not.
    """
    settings = config.distributed
    call = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new"]
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


def wrong_names(config: Config) -> dict[str, tuple[str, str]]:
    """Return each host whose name cannot be right, with what is wrong and how to fix it.

    A name needs an address that is known here. Only one name may be this machine, because
    horovodrun would start the ranks of the other one here, too.
    """
    wrong, here = {}, None
    for name in (host.name for host in checked_hosts(config)):
        address = address_of(name)
        if address is None:
            fix = f"correct it in distributed.hosts, or add a line 'ADDRESS {name}' to /etc/hosts"
            wrong[name] = "has no address known here", fix
        elif is_this_machine(name) and here is not None:
            fix = "correct its address in /etc/hosts, or name this machine once with all its slots"
            wrong[name] = f"has an address of this machine ({address}), as {here} does", fix
        elif is_this_machine(name):
            here = name
    return wrong


def address_of(name: str) -> str | None:
    """Return the IPv4 address of a host's name, or None if this machine does not know it."""
    try:
        return socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return None


def is_this_machine(name: str) -> bool:
    """Return whether a host's name resolves to an address of this machine."""
    address = address_of(name) or ""
    mine = {one.address for all_of in psutil.net_if_addrs().values() for one in all_of}
    return address in mine or address.startswith("127.")


def run(config: Config, command: Sequence[str], hostfile: str | Path, file: str | Path) -> None:
    """Print the horovodrun command, run it, and show its output.

    Ctrl-C and SIGTERM stop the job; its ranks save checkpoints and say how to resume. Messages name
    `file`, the configuration file.

    Raises:
        ConfigError: the hosts' names cannot be right.
        DistributedError: Horovod is not installed, a host cannot be reached, or the job failed.
        KeyboardInterrupt: the job was stopped.
    """
    for name, (message, fix) in wrong_names(config).items():
        raise ConfigError(f"{name} {message}: {fix}")
    if shutil.which(program("horovodrun")) is None:
        raise DistributedError(
            f"Horovod is not installed: run {cli.command('horovod_lm.setup.install_horovod')}"
        )
    hostfile = write_hostfile(config, hostfile)
    if silent := silent_hosts(config, 15, environment_file(hostfile)):
        raise DistributedError(explain(config, [], silent, file))
    call = horovodrun_command(config, command, hostfile)
    print(shlex.join(call), flush=True)
    lines: deque[str] = deque(maxlen=400)
    was_lost = was_stopped = False

    def stop(*_: object) -> None:
        nonlocal was_stopped
        was_stopped = True
        process.terminate()

    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        stops = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, stop) for number in stops]
        try:
            for line in process.stdout or []:
                lines.append(line)
                print(line, end="", flush=True)
                if not was_lost and _LOST_RANK in line:
                    was_lost = True
                    silent = silent_hosts(config)  # while horovodrun ends the other ranks
        finally:
            for number, handler in zip(stops, before, strict=True):
                signal.signal(number, handler)
    if was_stopped:
        raise KeyboardInterrupt
    if process.returncode:
        silent = silent if was_lost else silent_hosts(config)
        raise DistributedError(explain(config, lines, silent, file))


def silent_hosts(
    config: Config, seconds: int = SSH_TIMEOUT, copied: Path | None = None
) -> dict[str, str]:
    """Return the hosts on which ssh cannot run a command now, with its last line for each.

    `copied`, if it exists, is copied to the same place on every host, readable by its owner only.
    """
    content = copied.read_bytes() if copied and copied.exists() else b""

    def problem(name: str) -> str:
        line = "true"
        if content:  # atomically: the hosts may share the disk
            path, new = shlex.quote(str(copied)), shlex.quote(f"{copied}.{name}")
            line = f'umask 077; mkdir -p "$(dirname {path})" && cat > {new} && mv {new} {path}'
        call = ssh_command(config, name, line, seconds)
        try:
            done = subprocess.run(call, input=content, capture_output=True, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            return f"no answer for {seconds} s"
        why = last_line(done.stderr.decode("utf-8", "replace")) or "it does not say why"
        return why if done.returncode else ""

    names = [host.name for host in checked_hosts(config) if not is_this_machine(host.name)]
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        problems = zip(names, pool.map(problem, names), strict=True)
        return {name: text for name, text in problems if text}


def explain(
    config: Config, lines: Sequence[str], silent: Mapping[str, str], file: str | Path
) -> str:
    """Return why a job failed: hosts that cannot be reached, or the rank that hung or failed.

    `lines` are the last ones of horovodrun's output; `silent` is what `silent_hosts` returned.
    """
    if silent:
        doctor = cli.command("horovod_lm.setup.doctor", "--hosts", file)
        names = " and ".join(f"{name} ({why})" for name, why in silent.items())
        return (
            f"cannot reach {names}: check the machine, its network, and distributed.ssh_user,"
            f" ssh_port and ssh_identity_file; to check every host: {doctor}"
        )
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
    how = how_it_ended(code if code >= 0 else 128 - code)
    if code == 255:  # as ssh ends when a signal ended its command
        how = "was killed, for example because memory ran out"
    return f"rank {rank} on {host_of[rank]} failed first: it {how}; see above"


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
    add = parser.add_argument
    place_help = "where to write it (default: %(default)s in the project's folder)"
    add("--hostfile", default=DEFAULT_HOSTFILE, metavar="PATH", help=place_help)
    add("--run", action="store_true", help="start the job; if it fails, name the host or rank")
    command_help = "after --: what to run instead of training"
    add("command", nargs="*", metavar="COMMAND", help=command_help)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    words = arguments.command or training_command(arguments)
    if arguments.run:
        run(config, words, arguments.hostfile, arguments.config)
        return 0
    for name, (message, fix) in wrong_names(config).items():
        print(f"warning: {name} {message}: {fix}", file=sys.stderr)
    hostfile = write_hostfile(config, arguments.hostfile)
    print(shlex.join(horovodrun_command(config, words, hostfile)))
    return 0


if __name__ == "__main__":
    run_cli(main)
