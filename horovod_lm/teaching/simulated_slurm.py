"""A real Slurm on simulated hosts, for tests and for page 09.

    with Hosts(2) as hosts, Slurm(hosts) as slurm:
        print(slurm.run("sinfo"))

slurmctld runs on the first host, slurmd on each. On Debian they are in `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from horovod_lm.teaching.simulated_hosts import ADMIN_PATH, Hosts, InHost
from horovod_lm.teaching.simulated_hosts import why_not_here as why_no_hosts
from horovod_lm.utils.errors import DistributedError, last_line

SECONDS_TO_START = 40
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun", "salloc")
CONF = """
ClusterName=simulated
SlurmctldHost={first}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def why_not_here() -> str | None:
    """Return why Slurm cannot be simulated on this machine, or None if it can."""
    programs = ("slurmctld", "slurmd", "munged")
    missing = [name for name in programs if not shutil.which(name, path=ADMIN_PATH)]
    if missing:
        return f"Slurm is not installed: {', '.join(missing)} (apt install slurm-wlm munge)"
    return why_no_hosts()


class Slurm:
    """A Slurm cluster whose nodes are simulated hosts; a context manager.

    Args:
        hosts: the hosts.
        cpus: CPUs that each host offers; jobs may together have more than the machine has.
        gpus: GPUs that each host offers. They are terminals: Slurm only counts them.

    Attributes:
        bin: a folder with `sbatch` and the other commands, which run on the first host; in front of
            PATH it makes them work in any process of this machine.

    Raises:
        DistributedError: Slurm is missing, or does not start.
    """

    def __init__(self, hosts: Hosts, cpus: int = 2, gpus: int = 0) -> None:
        if reason := why_not_here():
            raise DistributedError(reason)
        self.hosts, self.folder = hosts, hosts.folder / "slurm"
        self.bin = self.folder / "bin"
        self.bin.mkdir(parents=True)
        self._write_settings(cpus, gpus)
        self._daemons: list[InHost] = []
        first = hosts.names[0]
        files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munged.pid",
                 "log-file": "munged.log", "seed-file": "munged.seed"}  # fmt: skip
        paths = [f"--{option}={self.folder}/{name}" for option, name in files.items()]
        try:
            self._start(first, "munged", "--foreground", "--force", *paths)
            self._wait(lambda: (self.folder / "munge.socket").exists())
            self._start(first, "slurmctld", "-D", "-c")
            for name in hosts.names:
                self._start(name, "slurmd", "-D", "-N", name)
            self._wait(self._is_idle)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the daemons, and with them the jobs."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def run(self, *command: str, cwd: str | Path | None = None, **env: str) -> str:
        """Run a command on the first host with further variables `env`, and return what it prints.

        Raises:
            DistributedError: it failed; the text is its last line.
        """
        done = self.hosts.run(command, cwd=cwd, env={**self.env, **env})
        if done.returncode:
            raise DistributedError(last_line(done.stdout))
        return done.stdout.strip()

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process on a host that uses Slurm."""
        return {**os.environ, "PATH": ADMIN_PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _write_settings(self, cpus: int, gpus: int) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10 // 2**20
        (self.folder / "state").mkdir()
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}"
            for name, address in self.hosts.addresses.items()
        )
        names = self.hosts.names
        text = CONF.format(first=names[0], folder=self.folder, nodes=nodes, names=",".join(names))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        gres = f"Name=gpu File=/dev/tty[1-{gpus}]\n" if gpus else ""
        (self.folder / "gres.conf").write_text(gres)
        key = self.folder / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        enter = shlex.join(self.hosts.enter(names[0])[:-1])
        script = self.bin / CLIENTS[0]
        script.write_text(
            f"#!/bin/bash\nexport SLURM_CONF={self.folder}/slurm.conf\n"
            f"PATH=${{PATH//{self.bin}:/}}\n"  # in jobs, these names are Slurm's own commands
            f'exec {enter} "$PWD" "${{0##*/}}" "$@"\n'
        )
        script.chmod(0o755)
        for other in CLIENTS[1:]:
            (self.bin / other).symlink_to(script)

    def _is_idle(self) -> bool:
        done = self.hosts.run(["sinfo", "-h", "-o", "%t %D"], env=self.env)
        return done.stdout.strip() == f"idle {len(self.hosts.names)}"

    def _start(self, host: str, *command: str) -> None:
        with open(self.folder / f"{command[0]}-{host}.out", "w") as log:
            daemon = self.hosts.popen(
                command, host, env=self.env, stdout=log, stderr=subprocess.STDOUT
            )
        self._daemons.append(daemon)

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not ready():
            if time.monotonic() > deadline or any(one.poll() is not None for one in self._daemons):
                logs = "".join(path.read_text() for path in self.folder.glob("*.out"))
                raise DistributedError(f"Slurm does not start: {last_line(logs)}")
            time.sleep(0.1)
