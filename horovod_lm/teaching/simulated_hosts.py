"""Simulate several hosts on this machine with Linux namespaces.

    with Hosts(2, rate="100mbit") as hosts:
        config = hosts.configure(load_config("configs/tiny.yaml"))
        print(hosts.horovodrun(config, ["python", "-m", "horovod_lm.train", ...]).stdout)

Each host has its own network, name, process ids and sshd, and a link to a common switch. The rate
of a link can be changed, and the link can be cut, while a job runs. The hosts share this machine's
cores, memory and disk. Needs Linux and root; `why_not_here` says what is missing.

A host is one process, the first of a process-id namespace with its own network, name and mounts
(https://man7.org/linux/man-pages/man7/namespaces.7.html). When the first process of a namespace
ends, the kernel ends all others in it, so nothing is left behind. It ends when its standard input
closes, which also happens when its owner is killed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from horovod_lm.launch.hosts import horovodrun_command, write_hostfile
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DistributedError, last_line

NETWORK = "198.18.0"  # reserved for measuring networks (RFC 2544), so it hides no real one
INTERFACE, SWITCH = "hv0", "switch"
SSH_PORT = 2222
LONGEST_QUEUE = "500ms"  # the switch drops packets that would wait longer
BURST_SECONDS = 0.01  # a burst may pass unshaped; the kernel's timer needs at least one tick
# Debian installs administrators' programs in folders that are not on every user's PATH.
ADMIN_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
TOOLS = ("unshare", "nsenter", "ip", "tc", "ssh", "ssh-keygen", "sshd")
PACKAGES = "util-linux iproute2 openssh-client openssh-server"
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child")

# The first process of the switch.
SWITCH_SCRIPT = f"""
set -e
ip link add {SWITCH} type bridge
ip link set {SWITCH} up
echo ready
exec cat
"""
# The first process of a host. $1: its name; $2: the folder with keys and settings; then pairs of a
# folder and the path at which this host sees it. Only this host sees the mounts.
HOST_SCRIPT = f"""
set -e
name=$1 folder=$2; shift 2
echo "$name" > /proc/sys/kernel/hostname
ip link set lo up
mount --bind "$folder/$name.hosts" /etc/hosts
mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
mount -t tmpfs tmpfs /run
mkdir /run/sshd
"$(command -v sshd)" -D -e -f "$folder/sshd_config" 2> "$folder/$name.sshd.log" &
until grep -q ':{SSH_PORT:04X} 00000000:0000 0A' /proc/net/tcp; do
    kill -0 $! 2> /dev/null || {{ cat "$folder/$name.sshd.log"; exit 1; }}
    sleep 0.02
done
echo ready
cat
"""
SSHD_CONFIG = """
Port {port}
HostKey "{folder}/host_key"
AuthorizedKeysFile "{folder}/key.pub"
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PidFile none
UseDNS no
MaxStartups 100
ClientAliveInterval 2
ClientAliveCountMax 3
"""
SSH_CONFIG = """
UserKnownHostsFile "{folder}/known_hosts"
GlobalKnownHostsFile /dev/null
LogLevel ERROR
ServerAliveInterval 2
ServerAliveCountMax 3
"""


def why_not_here() -> str | None:
    """Return in one sentence what is missing for simulated hosts on this machine, or None."""
    if platform.system() != "Linux":
        return "simulated hosts are made of Linux namespaces: this is not Linux"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=ADMIN_PATH) is None]
    if missing:
        return f"simulated hosts need {', '.join(missing)}: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "simulated hosts need root, which alone may create network namespaces"
    add_bridge = ["ip", "link", "add", "trial", "type", "bridge"]
    tried = _run([*UNSHARE, "--mount-proc", *add_bridge], check=False)
    if tried.returncode:
        return (
            "simulated hosts need namespaces and bridges, which are not allowed here"
            f" ({last_line(tried.stderr)}): start the container with --privileged"
        )
    return None


@cache
def kernel_can_delay() -> bool:
    """Return whether the kernel has `netem`, which delays packets. Needs root."""
    delay = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return _run([*UNSHARE, *delay], check=False).returncode == 0


class Hosts:
    """`count` hosts on this machine, named host0, host1 and so on; a context manager.

    Args:
        count: number of hosts.
        rate: rate of every host's link in each direction, as `tc` writes it ("100mbit"); None: not
            limited.
        own_folders: folders that each host sees as its own, initially empty, as if on its own disk.

    Raises:
        DistributedError: this machine cannot simulate hosts; the sentence says why.
    """

    def __init__(
        self, count: int = 2, rate: str | None = None, own_folders: Sequence[str | Path] = ()
    ) -> None:
        reason = why_not_here()
        if reason:
            raise DistributedError(reason)
        self.names = [f"host{number}" for number in range(count)]
        self.addresses = {name: f"{NETWORK}.{n + 1}" for n, name in enumerate(self.names)}
        self.folder = Path(tempfile.mkdtemp(prefix=f"horovod-hosts-{os.getpid()}-"))
        self._all: dict[str, _Namespaces] = {}
        try:
            self._write_settings()
            self._start([Path(folder).resolve() for folder in own_folders])
            if rate:
                self.set_link(rate=rate)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of every host, and delete the network and the keys."""
        for namespaces in self._all.values():
            namespaces.close()
        self._all.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- running commands -----------------------------------------------------------------------

    def popen(self, command: Sequence[str], host: str = "host0", **options: Any) -> InHost:
        """Start `command` on a host and return at once; see `subprocess.Popen` for the options."""
        call = self.enter(host, options.pop("cwd", None)) + list(command)
        env = {**os.environ, "PATH": ADMIN_PATH}
        return InHost(call, **{"start_new_session": True, "env": env, **options})

    def enter(self, host: str = "host0", folder: str | Path | None = None) -> list[str]:
        """Return the prefix that runs a command on a host; folder None: the current directory."""
        # A host has its own mounts, so a command that enters it starts in /.
        in_folder = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder or os.getcwd())]
        return [*self._at(host).enter("net", "uts", "mount", "pid"), *in_folder]

    def run(
        self, command: Sequence[str], host: str = "host0", timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on a host and return its exit code and its output.

        Raises:
            subprocess.TimeoutExpired: it ran for longer than `timeout` seconds.
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with self.popen(command, host, **{**pipes, **options}) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(list(command), process.returncode, output)

    def configure(self, config: Config) -> Config:
        """Return `config` with these hosts in its `distributed` section."""
        distributed = {
            "hosts": [{"name": name} for name in self.names],
            "interface": INTERFACE,
            "ssh_port": SSH_PORT,
            "ssh_identity_file": str(self.folder / "key"),
        }
        return config.with_overrides({"distributed": distributed})

    def horovodrun_command(self, config: Config, command: Sequence[str]) -> list[str]:
        """Return the horovodrun command that, on host0, starts `command` on every slot.

        The hosts of `config`, where it names any, take the place of these hosts.
        """
        config = config if config.distributed.hosts else self.configure(config)
        hostfile = write_hostfile(config, self.folder / "hostfile")
        return horovodrun_command(config, command, hostfile)

    def horovodrun(
        self, config: Config, command: Sequence[str], timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on every slot of every host, started on host0; see `run`."""
        return self.run(self.horovodrun_command(config, command), timeout=timeout, **options)

    # ---- links and power ------------------------------------------------------------------------

    def set_link(self, rate: str | None = None, delay: str | None = None) -> None:
        """Shape the outgoing traffic of every host until the next call.

        Args:
            rate: as `tc` writes it ("10mbit"); None: not limited.
            delay: of each packet ("50ms").

        Raises:
            DistributedError: `tc` rejects a value, or the kernel cannot delay packets.
        """
        if delay and not kernel_can_delay():
            raise DistributedError(
                "this machine's kernel has no netem: a link can have a rate, but no delay"
            )
        for name in self.names:
            tc = [*self._at(name).enter("net"), "tc", "qdisc"]
            _run([*tc, "del", "dev", INTERFACE, "root"], check=False)  # there may be none
            if rate:
                _run([*tc, "add", "dev", INTERFACE, "root", "handle", "1:", *token_bucket(rate)])
            if delay:
                place = ["parent", "1:1"] if rate else ["root"]
                _run([*tc, "add", "dev", INTERFACE, *place, "netem", "delay", delay])

    def unplug(self, host: str) -> None:
        """Cut a host's link: packets are lost, and no side is told."""
        self._switch("ip", "link", "set", self._at(host).name, "nomaster")

    def plug_in(self, host: str) -> None:
        """Restore a host's link."""
        self._switch("ip", "link", "set", self._at(host).name, "master", SWITCH)

    def power_off(self, host: str) -> None:
        """End every process of a host without a packet to the others, as a power cut does."""
        self.unplug(host)
        self._all.pop(host).close()
        self.names.remove(host)

    # ---- how they are made ----------------------------------------------------------------------

    def _at(self, host: str) -> _Namespaces:
        if host not in self._all:
            raise DistributedError(f"there is no host {host}; there are {', '.join(self.names)}")
        return self._all[host]

    def _switch(self, *command: str) -> None:
        _run([*self._all[SWITCH].enter("net"), *command])

    def _write_settings(self) -> None:
        folder = self.folder
        for key in ("key", "host_key"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
        for name, text in (("sshd_config", SSHD_CONFIG), ("ssh_config", SSH_CONFIG)):
            (folder / name).write_text(text.format(port=SSH_PORT, folder=folder))
        (folder / "known_hosts").write_text(f"* {(folder / 'host_key.pub').read_text()}")
        lines = [f"{address} {name}\n" for name, address in self.addresses.items()]
        for name in self.names:  # a file each, so that one host's can be wrong
            (folder / f"{name}.hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))

    def _start(self, own_folders: Sequence[Path]) -> None:
        self._all[SWITCH] = _Namespaces(SWITCH_SCRIPT, [], "the switch")
        for name in self.names:
            mounts: list[str] = []
            for number, place in enumerate(own_folders):
                own = self.folder / f"{name}.{number}"
                own.mkdir()
                place.mkdir(parents=True, exist_ok=True)
                mounts += [str(own), str(place)]
            self._all[name] = _Namespaces(HOST_SCRIPT, [name, str(self.folder), *mounts], name)
        for namespaces in self._all.values():
            namespaces.wait_until_ready()
        switch = str(self._all[SWITCH].first_process)
        for name in self.names:
            host = self._all[name]
            _run(["ip", "link", "add", INTERFACE, "netns", str(host.first_process), "type", "veth",
                 "peer", "name", name, "netns", switch])  # fmt: skip
            self._switch("ip", "link", "set", name, "master", SWITCH, "up")
            ip = [*host.enter("net"), "ip"]
            _run([*ip, "address", "add", f"{self.addresses[name]}/24", "dev", INTERFACE])
            _run([*ip, "link", "set", INTERFACE, "up"])


class InHost(subprocess.Popen):
    """A process on a host. A signal goes to its process group, as Ctrl-C in a terminal does."""

    def send_signal(self, sig: int) -> None:
        """Send `sig` also to the children of `nsenter`, which is what this process runs."""
        if self.poll() is None:
            os.killpg(self.pid, sig)


class _Namespaces:
    """One set of namespaces, held by its first process.

    That process runs a script, which prints "ready" and waits for its input to end. The name is for
    errors.
    """

    def __init__(self, script: str, arguments: Sequence[str], name: str) -> None:
        self.name = name
        self._holder = subprocess.Popen(
            [*UNSHARE, "--mount-proc", "sh", "-c", script, "sh", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PATH": ADMIN_PATH},
            start_new_session=True,  # Ctrl-C is for the owner, not for the host
        )  # fmt: skip
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._stdin, self._stdout = self._holder.stdin, self._holder.stdout

    def wait_until_ready(self) -> None:
        """Return when the script has printed "ready".

        Raises:
            DistributedError: the script ended before.
        """
        printed = ""
        for line in self._stdout:
            if line.strip() == "ready":
                children = f"/proc/{self._holder.pid}/task/{self._holder.pid}/children"
                self.first_process = int(Path(children).read_text().split()[0])
                return
            printed += line
        raise DistributedError(f"{self.name} does not start: {last_line(printed)}")

    def enter(self, *kinds: str) -> list[str]:
        """Return the prefix that runs a command in these kinds of namespaces."""
        return ["nsenter", f"--target={self.first_process}", *(f"--{kind}" for kind in kinds)]

    def close(self) -> None:
        """End the first process, and with it every other one."""
        self._stdin.close()
        try:
            self._holder.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._holder.kill()  # --kill-child ends the first process too
            self._holder.wait()
        self._stdout.close()


def token_bucket(rate: str) -> list[str]:
    """Return the arguments of `tc` for a link of `rate`, for example "100mbit".

    Raises:
        DistributedError: `rate` is not a rate.
    """
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    try:
        bits = float(rate[:-4]) * units[rate[-4:]]
    except (KeyError, ValueError):
        bits = 0.0
    if not bits > 0:
        raise DistributedError(f"a link's rate is written as 500kbit, 100mbit or 1gbit, not {rate}")
    burst = max(16_000, int(bits / 8 * BURST_SECONDS))
    return ["tbf", "rate", rate, "burst", f"{burst}b", "latency", LONGEST_QUEUE]


def _run(command: Sequence[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command; with `check`, raise DistributedError with its last line if it fails."""
    done = subprocess.run(
        command, env={**os.environ, "PATH": ADMIN_PATH},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if check and done.returncode:
        raise DistributedError(f"{' '.join(command)} failed: {last_line(done.stderr)}")
    return done
