"""What a host on this machine is made of: Linux namespaces, a cable to a switch, and sshd.

A host is one process, the first of its own process namespace, which also has a network, a name and
mounts of its own (https://man7.org/linux/man-pages/man7/namespaces.7.html). The kernel ends a
process namespace with its first process, and a network with the last process in it: so when that
one process ends, everything that ran on the host ends, and nothing is left to tidy up. It ends when
its standard input is closed, which the kernel also does when the owner is killed.
"""

from __future__ import annotations

import os
import platform
import select
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from horovod_lm.utils.errors import DistributedError, last_line

INTERFACE, SWITCH = "hv0", "switch"
SSH_PORT = 2222
SECONDS_TO_START = 20
# Where Debian keeps the tools of administrators, which is not on everybody's PATH.
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
PACKAGES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child")

# The first process of the switch: it joins the cables.
SWITCH_SCRIPT = f"""
set -e
ip link add {SWITCH} type bridge
ip link set {SWITCH} up
echo ready
exec cat
"""

# The first process of a host. $1: its name; $2: the folder with keys and settings; then pairs of
# a folder of its own and the place where the host sees it.
# The mounts are seen by this host alone: names, ssh's settings, and where sshd keeps its files.
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


def why_not_here() -> str | None:
    """Return in one sentence what is missing for hosts on this machine, or None."""
    if platform.system() != "Linux":
        return "several hosts on one machine are made of Linux namespaces: this is not Linux"
    missing = [tool for tool in PACKAGES if shutil.which(tool, path=SEARCHED) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES[tool] for tool in missing}))
        return f"several hosts on one machine need {', '.join(missing)}: apt-get install {packages}"
    if os.geteuid() != 0:
        return "several hosts on one machine need root, who alone may make network namespaces"
    tried = run(
        [*UNSHARE, "--mount-proc", "ip", "link", "add", "trial", "type", "bridge"], check=False
    )
    if tried.returncode:
        return (
            "several hosts on one machine need namespaces and bridges, which are not allowed here"
            f" ({last_line(tried.stderr)}): a container must be started with --privileged"
        )
    return None


@cache
def kernel_can_delay() -> bool:
    """Return whether the kernel has `netem`, which delays and loses packets; ask as root."""
    delay = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return run([*UNSHARE, *delay], check=False).returncode == 0


class Namespaces:
    """One set of namespaces, held by its first process.

    Args:
        script: what the first process does; it prints "ready" and then waits for its input to end.
        arguments: of the script.
        name: what to call it in an error.
    """

    def __init__(self, script: str, arguments: Sequence[str], name: str) -> None:
        self.name = name
        self._holder = subprocess.Popen(
            [*UNSHARE, "--mount-proc", "sh", "-c", script, "sh", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(), start_new_session=True,  # Ctrl-C is the owner's, not the host's
        )  # fmt: skip
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._stdin, self._stdout = self._holder.stdin, self._holder.stdout

    def wait_until_ready(self) -> None:
        """Return when the script has said so.

        Raises:
            DistributedError: it ended before, or said nothing for `SECONDS_TO_START`.
        """
        said = []
        while select.select([self._stdout], [], [], SECONDS_TO_START)[0]:
            line = self._stdout.readline()
            if line.strip() == "ready":
                children = f"/proc/{self._holder.pid}/task/{self._holder.pid}/children"
                self.first_process = int(Path(children).read_text().split()[0])
                return
            if not line:
                break
            said.append(line)
        reason = last_line("".join(said)) or f"nothing happened for {SECONDS_TO_START} s"
        raise DistributedError(f"{self.name} does not start: {reason}")

    def enter(self, *kinds: str) -> list[str]:
        """Return the call that runs what follows it in here: in all namespaces, or in `kinds`."""
        kinds = kinds or ("net", "uts", "mount", "pid")
        return ["nsenter", f"--target={self.first_process}", *(f"--{kind}" for kind in kinds)]

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the network's administrator in here, and wait for it."""
        return run([*self.enter("net"), *command], check)

    def close(self) -> None:
        """End the first process, and with it everything in here."""
        self._stdin.close()
        try:
            self._holder.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._holder.kill()  # --kill-child takes the first process along
            self._holder.wait()
        self._stdout.close()


def join(host: Namespaces, switch: Namespaces, address: str) -> None:
    """Put a cable between a host and the switch; it is never seen outside of the two."""
    here, there = str(host.first_process), str(switch.first_process)
    run(["ip", "link", "add", INTERFACE, "netns", here, "type", "veth",
         "peer", "name", host.name, "netns", there])  # fmt: skip
    switch.run("ip", "link", "set", host.name, "master", SWITCH, "up")
    host.run("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
    host.run("ip", "link", "set", INTERFACE, "up")


def environment() -> dict[str, str]:
    """Return this process's environment, with the tools of administrators on PATH."""
    return {**os.environ, "PATH": SEARCHED}


def run(command: Sequence[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Raises:
        DistributedError: `check`, and it failed; the sentence holds the last line that it said.
    """
    done = subprocess.run(
        command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if check and done.returncode:
        raise DistributedError(f"{' '.join(command)} failed: {last_line(done.stderr)}")
    return done
