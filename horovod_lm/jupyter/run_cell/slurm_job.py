"""A Slurm job for a notebook: submit it, stop it, and report what its ranks print.

    python -m horovod_lm.jupyter.run_cell.slurm_job JOB LOG     # until the job has ended

On SIGTERM, every rank saves a checkpoint and ends; a job that is still in the queue leaves it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horovod_lm.jupyter.run_cell.framed_horovodrun import EVENTS_VARIABLE
from horovod_lm.launch.slurm import MODULE as LAUNCHER
from horovod_lm.training.run_dir import RunFolder
from horovod_lm.utils.errors import ConfigError, last_line

BEFORE_LIMIT = "--signal=B:USR1@120"  # seconds; as in configs/jobs/slurm.sbatch
POLL_INTERVAL = 1.0  # seconds
GRACE_PERIOD = 120.0  # seconds that ranks have to save, as before the time limit
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")
_OF_RANK = re.compile(r" *(\d+): (.*)", re.DOTALL)  # as `srun --label` writes it
_RANK_ENDED = re.compile(
    r"srun: error: \S+: tasks? (\d+).*: (?:Exited with exit code (\d+)|(\w[\w ]*\w))"
)
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


def submit(
    call: Sequence[str], run: RunFolder, size: int, options: Sequence[str], cwd: Path
) -> list[str]:
    """Submit a job of `size` tasks, each of which runs `call`; return the call that watches it.

    `run` gives the job its name and the place of its log; `options` are more options of `sbatch`.

    Raises:
        ConfigError: Slurm is not here, or refuses the job.
    """
    run.log_dir.mkdir(parents=True, exist_ok=True)  # Slurm does not make it
    log = run.log_dir / "slurm-%j.log"
    script = f"exec {shlex.join([sys.executable, '-m', LAUNCHER, *call])}"
    sbatch = ["sbatch", "--parsable", BEFORE_LIMIT, f"--job-name={run.name}", f"--ntasks={size}"]
    sbatch += [f"--output={log}", *options, f"--wrap={script}"]
    for each in ([*sbatch, "--test-only"], sbatch):  # a job that can never run would wait for ever
        try:
            done = subprocess.run(each, capture_output=True, text=True, cwd=cwd)
        except FileNotFoundError:
            raise ConfigError("there is no sbatch here: use a host of the cluster") from None
        if done.returncode:
            raise ConfigError(f"Slurm refuses the job: {last_line(done.stderr)}")
    job = done.stdout.strip().partition(";")[0]  # some sites add ";CLUSTER"
    return ["sbatch", job, str(log).replace("%j", job)]


def stop(job: str) -> None:
    """Remove a job from the queue, or let its ranks save and end; return at once."""
    subprocess.run(["scancel", "--quiet", "--state=PENDING", job])
    subprocess.run(["scancel", "--quiet", "--batch", "--signal=INT", job])


def find(job: str, field: str) -> str:
    """Return a field of `scontrol show job`; "" if Slurm does not know the job."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    found = re.search(rf"\b{field}=(\S+)", shown)
    return found[1] if found else ""


def events_of(line: str) -> list[dict[str, Any]]:
    """Return the events that a line of the job's log stands for."""
    if found := _OF_RANK.fullmatch(line):
        return [{"event": "output", "rank": int(found[1]), "text": found[2]}]
    events: list[dict[str, Any]] = [{"event": "output", "rank": None, "text": line}]
    if found := _RANK_ENDED.match(line):
        code = int(found[2]) if found[2] else 128 + _SIGNALS.get(found[3], signal.SIGKILL)
        events.append({"event": "rank_ended", "rank": int(found[1]), "code": code})
    return events


def main() -> int:
    """Run the command line; return the job's exit code."""
    events, (job, log) = int(os.environ.pop(EVENTS_VARIABLE)), sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: stop(job))
    position, is_live = 0, True
    while is_live:
        # Before the log is read: it is complete when it is read for the last time.
        is_live = find(job, "JobState") in LIVE
        with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
            file.seek(position)
            for line in file:
                if is_live and not line.endswith(b"\n"):
                    break  # not yet complete
                position += len(line)
                for event in events_of(line.decode("utf-8", "replace")):
                    os.write(events, json.dumps(event).encode() + b"\n")
        if is_live:
            time.sleep(POLL_INTERVAL)
    return int(find(job, "ExitCode").partition(":")[0] or 1)


if __name__ == "__main__":
    sys.exit(main())
