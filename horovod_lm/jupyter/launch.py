"""Training jobs from a cell: `launch` returns at once, and the kernel stays free.

job = launch("configs/tiny.yaml", np=2)
job.status                     # running: step 40 of 600, loss 3.21
await job                      # in a cell of its own; the Stop button ends the job
job.metrics().tail()
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import shlex
import sys
from collections.abc import Generator, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from horovod_lm.jupyter.run_cell import slurm_job
from horovod_lm.jupyter.run_cell.horovodrun_job import (
    HOROVODRUN,
    JobProcess,
    JobSpec,
    require_horovod,
    threads_per_rank,
)
from horovod_lm.jupyter.run_cell.job_result import RankError
from horovod_lm.jupyter.widgets.dashboard_view import RunView
from horovod_lm.launch.elastic_hosts import elastic_command, loopback_name, read_hosts, write_hosts
from horovod_lm.launch.hosts import with_environment, write_environment
from horovod_lm.training.checkpoint import find_checkpoints
from horovod_lm.training.metrics import COLUMNS, read_metrics
from horovod_lm.training.run_dir import RunFolder, default_run_name
from horovod_lm.utils.cli import command, shown
from horovod_lm.utils.config import Config, DistributedConfig, load_config, save_config
from horovod_lm.utils.errors import ConfigError
from horovod_lm.utils.progress import format_seconds

if TYPE_CHECKING:
    import pandas

    from horovod_lm.jupyter.widgets.dashboard import Dashboard

POLL_INTERVAL = 0.2  # seconds
GRACE_PERIOD = 8.0  # seconds that ranks have to save a checkpoint after SIGTERM
_JOBS: WeakValueDictionary[Path, TrainingJob] = WeakValueDictionary()  # of this kernel, by folder
HOSTS_FILE = "hosts"  # in the folder of an elastic run: a line for each of its workers


def launch(
    config: Config | str | Path,
    np: int = 2,
    *,
    overrides: Iterable[str] | Mapping[str, Any] | None = None,
    run_name: str | None = None,
    resume: bool = False,
    elastic: bool = False,
    threads: int | None = None,
    scheduler: str | None = None,
) -> TrainingJob:
    """Start `horovodrun -np N python -m horovod_lm.train` and return at once.

    Args:
        config: the configuration, or the path of a YAML file.
        np: how many ranks; without a scheduler, all on this host.
        overrides: changes on top of `config`, as `load_config` takes them.
        run_name: the run's folder under `runs/`; default: a name that no run has.
        resume: resume the run of that name from its newest checkpoint.
        elastic: continue when ranks die, and let others join (`job.add_worker()`); each worker
            gets a host name of its own.
        threads: CPU threads of each rank; default: an equal share of the host's cores.
        scheduler: "slurm", followed by options of `sbatch`, as in "slurm --nodes=2": submit the
            ranks as a Slurm job of `np` tasks, which the end of the kernel stops as well.

    Raises:
        ConfigError: a setting is wrong, the run is training already, there is nothing to resume, or
            Slurm refuses the job.
        DistributedError: Horovod is not installed.
    """
    require_horovod()
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        config = config.with_overrides(overrides)
    run = RunFolder.of(config, run_name or default_run_name("job"))
    other = _JOBS.get(run.run_dir)
    if other is not None and other.is_running:
        raise ConfigError(
            f"run {run.name!r} is training already ({other.status}): call stop() of its job first,"
            " or choose another run_name"
        )
    if resume and not find_checkpoints(run.checkpoint_dir):
        raise ConfigError(
            f"run {run.name!r} has no checkpoint to resume from in {run.checkpoint_dir}: leave out"
            " resume=True to start it"
        )
    if scheduler is not None and (elastic or scheduler.split()[:1] != ["slurm"]):
        raise ConfigError(f"scheduler={scheduler!r}: write slurm and options of sbatch, no elastic")
    if np < 1:
        raise ConfigError(f"np={np}: there must be at least one rank")
    if config.distributed.hosts and not (elastic or scheduler):
        how = command("horovod_lm.launch.hosts", "--config", "FILE", "--run")
        raise ConfigError(f"launch trains on this host; on those of distributed.hosts: {how}")
    given = config.distributed.threads_per_rank
    wanted = threads or (None if given == "auto" else given)
    share = wanted if scheduler else threads_per_rank(np, wanted)
    try:
        if not resume:
            run.archive_existing_run()
            save_config(config, run.run_dir / "config.yaml")
        call = _call(config, run, np, resume, elastic, scheduler, share)
    except OSError as error:
        raise ConfigError(
            f"the run's folder {run.run_dir} cannot be written: {error.strerror}"
        ) from None
    # Elastic ranks divide the cores themselves whenever their number changes.
    env = {} if scheduler or elastic and not threads else {"OMP_NUM_THREADS": str(share)}
    spec = JobSpec(
        np, call, env, what=f"run {run.name}", elastic=elastic, log_dir=run.log_dir,
        grace_period=slurm_job.GRACE_PERIOD if scheduler else GRACE_PERIOD,
        cwd=str(config.project_root), launcher=slurm_job.__name__ if scheduler else HOROVODRUN,
    )  # fmt: skip
    job = _JOBS[run.run_dir] = TrainingJob(run, spec)
    return job


class TrainingJob:
    """A training run in processes of its own, which end with the kernel at the latest.

    Attributes:
        run: where its files are.
        size: the number of ranks at the start.
    """

    def __init__(self, run: RunFolder, spec: JobSpec) -> None:
        self.run, self.size = run, spec.size
        self._view = RunView(run.run_dir, run.log_dir, skip_existing=True)
        # horovodrun never uses a host name again on which a rank has failed.
        self._new_names = map(loopback_name, count(spec.size))
        with contextlib.suppress(OSError):  # the job runs without `console-rankN.log`
            run.log_dir.mkdir(parents=True, exist_ok=True)
        self._process = JobProcess(spec, self._note)

    @property
    def is_running(self) -> bool:
        """Whether a process of the job may still run."""
        return not self._process.ended.done()

    @property
    def error(self) -> RankError | None:
        """The error that it failed with; None while it runs, after success, and after a stop."""
        if self.is_running:
            return None
        error = self._process.result.error()
        return error if isinstance(error, RankError) else None

    @property
    def status(self) -> str:
        """Its state in words."""
        if self.is_running:
            self._view.update()
        known = [f"step {self._view.step} of {self._view.total_steps}"]
        if not math.isnan(self._view.loss):
            known.append(f"loss {self._view.loss:.4f}")
        if not self._view.total_steps:
            known = []
        if self.is_running:
            return f"running: {', '.join(known)}" if known else "starting"
        after = "after " + ", ".join([*known, format_seconds(self._process.seconds)])
        if self._process.result.was_stopped:
            config = shown(self.run.run_dir / "config.yaml")
            how = "resume=True, elastic=True" if self._process.result.elastic else "resume=True"
            call = f"launch({config!r}, {self.size}, run_name={self.run.name!r}, {how})"
            return f"stopped by you {after}; to resume: {call}"
        if self.error is not None:
            log = self.run.log_dir / f"console-rank{self.error.rank or 0}.log"
            return f"failed {after}: {self.error}; log: {log}"
        return f"done {after}"

    @property
    def processes(self) -> dict[int, int]:
        """Process ids of the ranks on this host, by rank."""
        return dict(self._process.result.processes)

    def log(self, rank: int = 0) -> str:
        """Return what a rank has printed so far; the file is `logs/console-rankN.log`."""
        return self._process.result.text(rank)

    def metrics(self) -> pandas.DataFrame:
        """Return `metrics.csv` as a table, one row per measurement; empty before the first one."""
        import pandas

        path = self.run.run_dir / "metrics.csv"
        return pandas.DataFrame(
            read_metrics(path.parent) if path.is_file() else [], columns=COLUMNS
        )

    def dashboard(self) -> Dashboard:
        """Return a widget that watches this job and can stop it."""
        from horovod_lm.jupyter.widgets.dashboard import Dashboard

        return Dashboard(self)

    def add_worker(self) -> str:
        """Add a worker on this host to an elastic job; return its host name.

        Raises:
            ConfigError: the job is not elastic.
        """
        workers, name = self._workers(), next(self._new_names)
        write_hosts(self.run.run_dir / HOSTS_FILE, [*workers, f"{name}:1"])
        return name

    def remove_worker(self) -> str:
        """Remove the last worker from an elastic job; return its host name.

        Raises:
            ConfigError: the job is not elastic.
        """
        *kept, last = self._workers()
        write_hosts(self.run.run_dir / HOSTS_FILE, kept)
        return last.partition(":")[0]

    def _workers(self) -> list[str]:
        if not self._process.result.elastic:
            raise ConfigError(f"run {self.run.name} is not elastic: launch(..., elastic=True)")
        hosts = read_hosts(self.run.run_dir / HOSTS_FILE)
        return [f"{name}:{slots}" for name, slots in hosts.items()]

    def ask_to_stop(self) -> None:
        """Ask every rank to save a checkpoint and end after its current step; return at once."""
        self._process.terminate()

    def stop(self) -> str:
        """Let every rank save a checkpoint and end after its current step; return the status."""
        self._process.stop()
        return self.status

    def wait(self, timeout: float | None = None) -> TrainingJob:
        """Wait for the end, at most `timeout` seconds; this blocks the kernel.

        Raises:
            RankError: it failed.
            TimeoutError: it has not ended; it continues.
        """
        self._process.wait(timeout)
        return self._ended()

    def __await__(self) -> Generator[Any, None, TrainingJob]:
        return self._wait().__await__()

    async def _wait(self) -> TrainingJob:
        """Wait for the end, with the kernel free; an interrupt ends every rank."""
        try:
            # In steps: a kernel sees an interrupt when its event loop wakes up, and not before.
            while self.is_running:
                await asyncio.sleep(POLL_INTERVAL)
        except asyncio.CancelledError:
            print(await asyncio.to_thread(self.stop))
            raise
        return self._ended()

    def _ended(self) -> TrainingJob:
        if self.error is not None:
            raise self.error
        return self

    def __repr__(self) -> str:
        return f"<run {self.run.name}, {self.size} ranks: {self.status}>"

    def _note(self, event: dict[str, Any]) -> None:
        if event["event"] == "ended":
            self._view.update()  # for the last time: a later run of this name takes the folder


def _call(
    config: Config, run: RunFolder, size: int, resume: bool, elastic: bool, scheduler: str | None,
    threads: int | None,
) -> list[str]:  # fmt: skip
    """Return the call that starts the ranks of a run whose configuration is in its folder.

    A Slurm job is submitted; the call watches it.
    """
    training = [sys.executable, "-m", "horovod_lm.train"]
    if resume:
        training += ["--resume", str(run.run_dir)]
    else:
        training += ["--config", str(run.run_dir / "config.yaml"), "--run-name", run.name]
    if elastic:
        names = [f"{loopback_name(number)}:1" for number in range(size)]
        hosts_file = write_hosts(run.run_dir / HOSTS_FILE, names)
        # Not its hosts, interface and ssh: all workers are here.
        here = Config(distributed=DistributedConfig(environment=config.distributed.environment))
        return elastic_command([*training, "--elastic"], hosts_file, config=here)
    hostfile = run.run_dir / "hostfile"
    write_environment(config, hostfile)
    training = with_environment(config, hostfile, training)
    if scheduler:
        options = [f"--cpus-per-task={threads}"] if threads else []
        options += shlex.split(scheduler)[1:]
        return slurm_job.submit(training, run, size, options, config.project_root)
    return ["horovodrun", "-np", str(size), *training]
