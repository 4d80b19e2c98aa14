"""Several hosts on this machine: what a cluster does, tried out where there is none.

    with Hosts(2, rate="100mbit") as hosts:
        config = hosts.configure(load_config("configs/tiny.yaml"))
        print(hosts.horovodrun(config, ["python", "-m", "horovod_lm.train", ...]).stdout)

Each host has a network, a name, processes and an sshd of its own, and a cable to a common switch
whose rate can be changed, and which can be pulled out, while a job runs. They share this machine's
cores, memory and disk. Needs Linux and root; `why_not_here` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from horovod_lm.launch.hosts import horovodrun_command, write_hostfile
from horovod_lm.teaching.namespaces import (
    HOST_SCRIPT,
    INTERFACE,
    SSH_PORT,
    SWITCH_SCRIPT,
    Namespaces,
    environment,
    join,
    kernel_can_delay,
    run,
    why_not_here,
)
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DistributedError

__all__ = ["Hosts", "kernel_can_delay", "why_not_here"]

FOLDER = "horovod-hosts-"
NETWORK = "198.18.0"  # set aside for measuring networks by RFC 2544: no real one is hidden by it
LONGEST_QUEUE = "500ms"  # what a switch holds back before it drops
BURST_SECONDS = 0.01  # what may pass at once, unshaped; no less than a timer's tick needs

SSHD_CONFIG = """
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
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
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
LogLevel ERROR
ServerAliveInterval 2
ServerAliveCountMax 3
"""


class Hosts:
    """`count` hosts on this machine, called host0, host1 and so on; use it with `with`.

    Args:
        count: how many.
        slots: ranks on each, one number for all or one per host.
        rate: of every host's link in each direction, as `tc` writes it ("100mbit"); None: as fast
            as the machine.
        own_folders: folders of which each host sees one of its own, empty at first, as if they
            lay on its own disk.
        wrong_names: lines of `/etc/hosts` that come before the right ones, by the host that
            holds them: `{"host1": "127.0.1.1 host1"}`.

    Raises:
        DistributedError: something is missing here; the sentence says what.
    """

    def __init__(
        self,
        count: int = 2,
        slots: int | Sequence[int] = 1,
        rate: str | None = None,
        own_folders: Sequence[str | Path] = (),
        wrong_names: Mapping[str, str] | None = None,
    ) -> None:
        reason = why_not_here()
        if reason:
            raise DistributedError(reason)
        self.names = [f"host{number}" for number in range(count)]
        self.addresses = {name: f"{NETWORK}.{n + 1}" for n, name in enumerate(self.names)}
        self.slots = [slots] * count if isinstance(slots, int) else list(slots)
        remove_what_dead_owners_left()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
        self._all: dict[str, Namespaces] = {}
        try:
            self._write_settings(wrong_names or {})
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
        """End every process of every host; hosts, network and keys are gone then."""
        for namespaces in self._all.values():
            namespaces.close()
        self._all.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what runs on them ----------------------------------------------------------------------

    def popen(self, command: Sequence[str], host: str = "host0", **options: Any) -> InHost:
        """Start `command` on a host, in this process's folder, and return at once.

        Args:
            command: its arguments.
            host: the name of the host.
            options: of `subprocess.Popen`.
        """
        call = self.enter(host, options.pop("cwd", None)) + list(command)
        return InHost(call, **{"start_new_session": True, "env": environment(), **options})

    def enter(self, host: str = "host0", folder: str | Path | None = None) -> list[str]:
        """Return what, put before a command, runs it on a host; None: in this process's folder."""
        # A host has mounts of its own, so whatever enters it begins at /.
        in_folder = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder or os.getcwd())]
        return [*self._at(host).enter(), *in_folder]

    def run(
        self, command: Sequence[str], host: str = "host0", timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on a host to its end, and return its code and what it said.

        Raises:
            DistributedError: it ran for longer than `timeout` seconds.
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with self.popen(command, host, **{**pipes, **options}) as process:
            try:
                said, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise DistributedError(
                    f"{' '.join(command)} was still running on {host} after {timeout} s"
                ) from None
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(list(command), process.returncode, said)

    def configure(self, config: Config) -> Config:
        """Return `config` with its `distributed` section naming these hosts."""
        return config.with_overrides({"distributed": self.distributed})

    @property
    def distributed(self) -> dict[str, Any]:
        """What a configuration's `distributed` section says about these hosts."""
        pairs = zip(self.names, self.slots, strict=True)
        return {
            "hosts": [{"name": name, "slots": slots} for name, slots in pairs],
            "interface": INTERFACE,
            "ssh_port": SSH_PORT,
            "ssh_identity_file": str(self.folder / "key"),
        }

    def horovodrun_command(self, config: Config, command: Sequence[str]) -> list[str]:
        """Return the call that, on host0, starts `command` on every slot of every host.

        A `config` that names hosts itself is taken as it is.
        """
        config = config if config.distributed.hosts else self.configure(config)
        hostfile = write_hostfile(config, self.folder / "hostfile")
        return horovodrun_command(config, command, hostfile)

    def horovodrun(
        self, config: Config, command: Sequence[str], timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on every slot of every host, started on host0; see `run`."""
        return self.run(self.horovodrun_command(config, command), timeout=timeout, **options)

    # ---- what happens to them -------------------------------------------------------------------

    def set_link(
        self,
        host: str | None = None,
        rate: str | None = None,
        delay: str | None = None,
        loss: str | None = None,
    ) -> None:
        """Shape what leaves a host, now and until it is called again.

        Args:
            host: its name; None: every host.
            rate: as `tc` writes it: "10mbit"; None: as fast as the machine.
            delay: of each packet: "50ms".
            loss: share of packets that are lost: "1%".

        Raises:
            DistributedError: `tc` refuses it, or the kernel cannot delay.
        """
        if (delay or loss) and not kernel_can_delay():
            raise DistributedError(
                "this machine's kernel has no netem: the rate of a link can be set, a delay or loss"
                " cannot"
            )
        netem = ["netem", *(["delay", delay] if delay else []), *(["loss", loss] if loss else [])]
        for name in [host] if host else self.names:
            tc = [*self._at(name).enter("net"), "tc", "qdisc"]
            run([*tc, "del", "dev", INTERFACE, "root"], check=False)  # there may be none
            if rate:
                run([*tc, "add", "dev", INTERFACE, "root", "handle", "1:", *token_bucket(rate)])
            if delay or loss:
                place = ["parent", "1:1"] if rate else ["root"]
                run([*tc, "add", "dev", INTERFACE, *place, *netem])

    def unplug(self, host: str) -> None:
        """Pull a host's cable out of the switch: packets vanish, and nobody is told."""
        self._all["switch"].run("ip", "link", "set", self._at(host).name, "nomaster")

    def plug_in(self, host: str) -> None:
        """Put a host's cable back."""
        self._all["switch"].run("ip", "link", "set", self._at(host).name, "master", "switch")

    def power_off(self, host: str) -> None:
        """Lose a host as in a power cut: every process of it ends, and no packet says so."""
        self.unplug(host)
        self._all.pop(self._at(host).name).close()

    # ---- how they are made ----------------------------------------------------------------------

    def _at(self, host: str) -> Namespaces:
        if host not in self.names or host not in self._all:
            there = ", ".join(name for name in self.names if name in self._all)
            raise DistributedError(f"there is no host {host}; there are {there or 'none'}")
        return self._all[host]

    def _write_settings(self, wrong_names: Mapping[str, str]) -> None:
        folder = self.folder
        for key in ("key", "host_key"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
        settings = {"port": SSH_PORT, "folder": folder}
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(**settings))
        (folder / "ssh_config").write_text(SSH_CONFIG.format(**settings))
        public = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"* {public}")
        lines = [f"{address} {name}" for name, address in self.addresses.items()]
        for name in self.names:
            own = [wrong_names.get(name, ""), "127.0.0.1 localhost", *lines]
            (folder / f"{name}.hosts").write_text("\n".join(own) + "\n")

    def _start(self, own_folders: Sequence[Path]) -> None:
        self._all["switch"] = Namespaces(SWITCH_SCRIPT, [], "the switch")
        for name in self.names:
            mounts: list[str] = []
            for number, place in enumerate(own_folders):
                own = self.folder / f"{name}.{number}"
                own.mkdir()
                place.mkdir(parents=True, exist_ok=True)
                mounts += [str(own), str(place)]
            arguments = [name, str(self.folder), *mounts]
            self._all[name] = Namespaces(HOST_SCRIPT, arguments, name)
        for namespaces in self._all.values():
            namespaces.wait_until_ready()
        for name in self.names:
            join(self._all[name], self._all["switch"], self.addresses[name])


class InHost(subprocess.Popen):
    """A process on a host. A signal goes to its whole group, as Ctrl-C in a terminal does."""

    def send_signal(self, sig: int) -> None:
        """Send `sig`; `nsenter`, which this process sees, would keep it to itself."""
        if self.poll() is None:
            os.killpg(self.pid, sig)

    def kill(self) -> None:
        """Kill it and its group."""
        self.send_signal(signal.SIGKILL)


def token_bucket(rate: str) -> list[str]:
    """Return `tc`'s words for a link of `rate`, for example "100mbit".

    Raises:
        DistributedError: that is no rate.
    """
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    number, unit = rate[:-4], rate[-4:]
    try:
        bits = float(number) * units[unit]
    except (KeyError, ValueError):
        bits = 0.0
    if not bits > 0:
        raise DistributedError(f"a link's rate is written as 500kbit, 100mbit or 1gbit, not {rate}")
    burst = max(16_000, int(bits / 8 * BURST_SECONDS))
    return ["tbf", "rate", rate, "burst", f"{burst}b", "latency", LONGEST_QUEUE]


def remove_what_dead_owners_left() -> None:
    """Delete the keys of hosts whose owner was killed; the hosts themselves ended with it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        owner = folder.name.removeprefix(FOLDER).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)
