"""Try Horovod in processes of its own: a broken build may crash the process that loads it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from horovod_lm.setup.steps import call
from horovod_lm.utils.errors import UserError, last_line

SECONDS = 120  # for a trial; importing torch from a cold disk takes most of it

# What each rank runs: `python -c RANK RANKS ANSWER`.
RANK = """
import json, pathlib, statistics, sys, time, torch
import horovod.torch as hvd
ranks = int(sys.argv[1])
hvd.init()
assert hvd.size() == ranks, f"{hvd.size()} ranks came up"
built = {"gloo": bool(hvd.gloo_built()), "nccl": bool(hvd.nccl_built())}
on_gpu = built["nccl"] and ranks == 1 and torch.cuda.is_available()
for device in ["cpu", "cuda"] if on_gpu else ["cpu"]:
    total = hvd.allreduce(torch.arange(3.0, device=device), op=hvd.Sum, name=device)
    assert total.tolist() == [0.0, ranks, 2.0 * ranks], total
tensor, times = torch.ones(1_000_000), []
for _ in range(22):
    started = time.perf_counter()
    hvd.allreduce(tensor, op=hvd.Sum, name="timed")
    times.append(time.perf_counter() - started)
if hvd.rank() == 0:
    answer = {"built": built, "milliseconds": 1e3 * statistics.median(times[2:])}
    pathlib.Path(sys.argv[2]).write_text(json.dumps(answer))
hvd.shutdown()
"""


class TrialError(UserError, RuntimeError):
    """Horovod failed; the text is the last line that it printed."""


class Trial(NamedTuple):
    """What a trial found."""

    built: dict[str, bool]  # whether "gloo" and "nccl" are in the build
    milliseconds: float  # the median time of 20 allreduces of 4 MB in CPU memory


def try_horovod(ranks: int = 1, folder: Path | None = None) -> Trial:
    """Import Horovod, start ranks, and reduce tensors; at one rank with NCCL also on a GPU.

    Args:
        ranks: 1 starts one process without horovodrun.
        folder: a folder for PYTHONPATH with the build; None: the installed Horovod.

    Raises:
        TrialError: a rank failed, or the ranks did not end in time.
    """
    env = environment_without_horovod() | {"OMP_NUM_THREADS": "1"}
    if folder is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(folder), env.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(ranks)]
    if ranks == 1:
        launcher = []
        env |= {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    # A folder of its own: in the current one, something could be called `horovod`.
    with tempfile.TemporaryDirectory() as place, Path(place, "output").open("w+") as output:
        answer = Path(place, "answer.json")
        command = [*launcher, sys.executable, "-c", RANK, str(ranks), str(answer)]
        try:
            code = call(
                command, seconds=SECONDS, grace=10, env=env, cwd=place, stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise TrialError(f"it hangs: not done after {SECONDS:.0f} s") from None
        if code != 0:
            output.seek(0)
            raise TrialError(_reason(code, output.read()))
        return Trial(**json.loads(answer.read_text()))


def environment_without_horovod() -> dict[str, str]:
    """Return this process's environment without the variables that configure Horovod."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}


def _reason(code: int, printed: str) -> str:
    """Return the last line of a failed process, or the error of a failed job's first rank."""
    if code < 0 and not printed.strip():
        return f"the process was ended by {signal.Signals(-code).name}, without a message"
    of_ranks = [line for line in printed.splitlines() if "<stderr>:" in line and "Error: " in line]
    return last_line(of_ranks[0] if of_ranks else printed) or "without a message"
