"""Try Horovod in processes of its own: a broken build may crash the process it is in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from horovod_lm.utils.errors import UserError, last_line

SECONDS_FOR_ONE_RANK = 120  # importing torch from a cold disk is most of it
SECONDS_FOR_RANKS = 60

ONE_RANK = """
import json, torch
import horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.arange(3.0), op=hvd.Sum, name="trial")
assert total.tolist() == [0.0, 1.0, 2.0], total
built = {"gloo": hvd.gloo_built(), "mpi": hvd.mpi_built(), "nccl": hvd.nccl_built()}
if built["nccl"] and torch.cuda.is_available():
    total = hvd.allreduce(torch.arange(3.0, device="cuda"), op=hvd.Sum, name="trial of a GPU")
    assert total.tolist() == [0.0, 1.0, 2.0], total
hvd.shutdown()
print(json.dumps({name: bool(has) for name, has in built.items()}))
"""

ALL_RANKS = """
import json, pathlib, statistics, sys, time, torch
import horovod.torch as hvd
hvd.init()
assert hvd.size() == int(sys.argv[1]), f"{hvd.size()} ranks came up"
tensor, times = torch.ones(int(sys.argv[2]) // 4), []
for _ in range(22):
    started = time.perf_counter()
    total = hvd.allreduce(tensor, op=hvd.Sum, name="trial")
    times.append(time.perf_counter() - started)
assert total[0].item() == hvd.size(), total[0]
if hvd.rank() == 0:
    pathlib.Path(sys.argv[3]).write_text(json.dumps(statistics.median(times[2:])))
"""


class TrialError(UserError, RuntimeError):
    """Horovod failed; the text is the last line that it printed."""


def try_one_rank(folder: Path | None = None) -> dict[str, bool]:
    """Import Horovod, start one rank, reduce a tensor; with NCCL and a GPU, one there, too.

    Args:
        folder: an unpacked wheel to try instead of the installed Horovod.

    Returns:
        Which of "gloo", "mpi" and "nccl" are in the build.

    Raises:
        TrialError: something of this did not work.
    """
    env = _environment(folder)
    env |= {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    said = _run([sys.executable, "-c", ONE_RANK], env, SECONDS_FOR_ONE_RANK)
    return dict(json.loads(said.splitlines()[-1]))


def time_allreduce(ranks: int = 2, size: int = 4_000_000, folder: Path | None = None) -> float:
    """Start ranks with horovodrun and time an allreduce between them.

    Args:
        ranks: how many.
        size: of the tensor, in bytes.
        folder: an unpacked wheel to try instead of the installed Horovod.

    Returns:
        The median time of 20 allreduces, in seconds.

    Raises:
        TrialError: the ranks did not come up, or did not end in time.
    """
    command = [str(Path(sys.executable).parent / "horovodrun")]
    if folder is not None:
        command = [sys.executable, "-m", "horovod.runner.launch"]
    with tempfile.TemporaryDirectory() as answers:
        answer = Path(answers) / "seconds.json"
        command += ["--gloo", "-np", str(ranks), sys.executable, "-c", ALL_RANKS]
        command += [str(ranks), str(size), str(answer)]
        _run(command, _environment(folder), SECONDS_FOR_RANKS)
        return float(json.loads(answer.read_text()))


def environment_without_horovod() -> dict[str, str]:
    """Return this process's environment, less what steers Horovod (a rank's, or a user's)."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}


def _environment(folder: Path | None) -> dict[str, str]:
    env = environment_without_horovod() | {"OMP_NUM_THREADS": "1"}
    if folder is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(folder), env.get("PYTHONPATH", "")])
    return env


def _run(command: list[str], env: dict[str, str], seconds: float) -> str:
    """Run a command to its end, or end it and its children at the time limit."""
    with tempfile.TemporaryDirectory() as elsewhere:  # not where a folder is called `horovod`
        try:
            process = subprocess.Popen(
                command,
                env=env,
                cwd=elsewhere,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise TrialError(f"{command[0]} does not start: {error.strerror}") from None
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            raise TrialError(f"it hangs: not done after {seconds:.0f} s") from None
        except BaseException:
            _stop(process)
            raise
    if process.returncode != 0:
        raise TrialError(_reason(process.returncode, out, err))
    return out


def _reason(code: int, out: str, err: str) -> str:
    """Return the last line of a failed process, or the error of a failed job's first rank."""
    if code < 0 and not err.strip():
        return f"the process was ended by {signal.Signals(-code).name}, and said nothing"
    of_ranks = [line for line in err.splitlines() if "<stderr>:" in line and "Error: " in line]
    return last_line(of_ranks[0] if of_ranks else err or out) or "it said nothing"


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()  # horovodrun takes its ranks along
    try:
        process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
