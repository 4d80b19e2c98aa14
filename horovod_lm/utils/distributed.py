"""The only door to Horovod: everything that differs between one process and many goes through here.

Each function does the right thing for one process, too, with Horovod absent or not initialised: a
reduction returns what it was given, a broadcast does nothing, the rank is 0 of 1.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from horovod_lm.utils.config import DistributedConfig
from horovod_lm.utils.errors import DistributedError
from horovod_lm.utils.machine import available_cores
from horovod_lm.utils.watchdog import Watchdog

MIB = 1024 * 1024
SECONDS_TO_BE_MISSED = 2  # beyond the Gloo timeout: the other ranks say that they lost one, not how
_SECONDS_BETWEEN_QUESTIONS = 0.1
_HOW_TO_INSTALL = "run python -m horovod_lm.install_horovod"
_GLOO_TIMEOUT = 30  # seconds, where nobody sets it
_REMOVED = "-1"  # the rank of a process whose host has left the job
# What launchers tell their processes; the first is horovodrun's, the others are MPI's.
_LAUNCHER_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@cache
def _horovod() -> Any | None:
    """Return `horovod.torch`, or None where it is not installed or does not load."""
    try:
        import horovod.torch as hvd
    except Exception as error:  # one built for another torch fails with OSError, not ImportError
        if not isinstance(error, ModuleNotFoundError):
            _say_once(
                f"Horovod is installed but does not load ({_first_line(error)}): {_HOW_TO_INSTALL}"
            )
        return None
    return hvd


def is_distributed() -> bool:
    """Return whether Horovod is initialised in this process, at any world size, 1 included."""
    # Horovod: before init() every query raises ValueError, so each helper asks this first.
    hvd = sys.modules.get("horovod.torch")
    return hvd is not None and bool(hvd.is_initialized())


def started_by_launcher() -> bool:
    """Return whether `horovodrun` or `mpirun` started this process."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES)


def setup_horovod(
    require_distributed: bool = True, settings: DistributedConfig | None = None
) -> tuple[int, int, int, bool]:
    """Initialise Horovod, give this rank its share of the CPU, and choose its GPU.

    Args:
        require_distributed: True: Horovod must be there. False: without a launcher, or with Horovod
            absent, go on alone and say so once.
        settings: fusion, cycle time, threads and time limits; None: their defaults.

    Returns:
        `(world_size, rank, local_rank, use_cuda)`.

    Raises:
        DistributedError: Horovod is required, or several ranks were started, and it is missing.
    """
    settings = settings or DistributedConfig()
    if _horovod() is None and (require_distributed or int(_launched_size()) > 1):
        raise DistributedError(
            f"Horovod is not installed for torch {torch.__version__}: {_HOW_TO_INSTALL}"
        )
    if _horovod() is None:
        _say_once("Horovod is not installed: training alone, in one process")
    elif require_distributed or started_by_launcher():
        _export_settings(settings)  # Horovod: it reads its settings when it starts
        join_world()
    use_cuda = take_share_of_host(settings, get_local_rank(), get_local_size())
    return get_world_size(), get_rank(), get_local_rank(), use_cuda


def join_world() -> None:
    """Initialise Horovod: return when all ranks have met.

    Elastic ranks meet again whenever the ranks change, and ask once more when one of them was lost
    on the way, or was so long in coming that the others had given up.

    Raises:
        DistributedError: not every rank came within the Gloo timeout.
        SystemExit: horovodrun has taken this elastic rank's host off the job.
    """
    while not is_distributed():
        try:
            _horovod().init()  # elastic: asks horovodrun for a rank, too
        except ValueError:
            if not elastic_launcher():
                seconds = os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]
                raise DistributedError(
                    f"not every rank was there within {seconds} s: the first rank whose output ends"
                    " in an error says why (distributed.gloo_timeout_seconds sets the time)"
                ) from None
            if _rank_in_environment() == _REMOVED:
                host = os.environ["HOROVOD_HOSTNAME"]
                print(f"{host} is no longer listed: its rank leaves, the others go on", flush=True)
                raise SystemExit(0) from None
            _horovod().shutdown()


def take_share_of_host(settings: DistributedConfig, local_rank: int, local_size: int) -> bool:
    """Give this rank its share of its host's cores, and its GPU. Return whether it has a GPU."""
    # Horovod: more threads than cores only wait for each other.
    if settings.threads_per_rank != "auto":
        torch.set_num_threads(settings.threads_per_rank)
    elif "OMP_NUM_THREADS" not in os.environ and (local_size > 1 or elastic_launcher()):
        torch.set_num_threads(max(1, available_cores() // local_size))
    if not torch.cuda.is_available():
        return False
    # Horovod: one GPU per local rank
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return True


def elastic_launcher() -> bool:
    """Return whether `horovodrun` started this process as one that may lose and gain ranks."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def end_when_frozen() -> AbstractContextManager[Any]:
    """Inside `with end_when_frozen():` a rank that stands still is killed, where horovodrun cannot.

    That is on several hosts; on one, nothing happens here. The other ranks miss it first.
    """
    if get_local_size() == get_world_size():
        return nullcontext()
    limit = float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", _GLOO_TIMEOUT))
    return Watchdog(limit + SECONDS_TO_BE_MISSED, f"rank {get_rank()}")


def shutdown() -> None:
    """End Horovod in this process; nothing happens where it was not started."""
    if is_distributed():
        _horovod().shutdown()


def get_rank() -> int:
    """Return this process's number among all ranks, 0 when alone."""
    return _horovod().rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of ranks, 1 when alone."""
    return _horovod().size() if is_distributed() else 1


def get_local_rank() -> int:
    """Return this process's number among the ranks of its host, 0 when alone."""
    return _horovod().local_rank() if is_distributed() else 0


def get_local_size() -> int:
    """Return the number of ranks on this host, 1 when alone."""
    return _horovod().local_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which prints and writes for all."""
    return get_rank() == 0


def reduce_sum(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return the sum of `values` over all ranks, on the CPU, in float64.

    Args:
        values: any shape, the same on every rank.
        name: what this reduction is called; every rank uses the same name.
    """
    values = values.detach().to("cpu", torch.float64)
    return (
        _horovod().allreduce(values, name=name, op=_horovod().Sum) if is_distributed() else values
    )


def start_reduce_sum(values: torch.Tensor, name: str) -> Any:
    """Begin `reduce_sum` and return at once; `finish_reduce_sum` waits for the result.

    Started beside the gradients it travels in their messages and costs nothing of its own.
    """
    values = values.detach().to("cpu", torch.float64)
    if not is_distributed():
        return values
    return _horovod().allreduce_async(values, name=name, op=_horovod().Sum)


def finish_reduce_sum(handle: Any) -> torch.Tensor:
    """Wait for a `start_reduce_sum` and return its result."""
    return _horovod().synchronize(handle) if is_distributed() else handle


def metric_average(value: float | torch.Tensor, name: str) -> float:
    """Return the plain mean of one number over all ranks.

    Ranks that counted different numbers of tokens need the weighted mean: `reduce_sum` of the sums
    and of the counts.
    """
    total = reduce_sum(torch.as_tensor(value, dtype=torch.float64).reshape(1), name)
    return float(total.item() / get_world_size())


def broadcast_object(value: Any, name: str, root_rank: int = 0) -> Any:
    """Return rank `root_rank`'s `value` on every rank; anything picklable."""
    # Horovod: without a name, two different broadcasts of one program could meet.
    return (
        _horovod().broadcast_object(value, root_rank=root_rank, name=name)
        if is_distributed()
        else value
    )


def gather_objects(value: Any, name: str) -> list[Any]:
    """Return every rank's `value`, in the order of ranks, on every rank."""
    return _horovod().allgather_object(value, name=name) if is_distributed() else [value]


def broadcast_parameters(model: torch.nn.Module, root_rank: int = 0) -> None:
    """Give every rank the parameters of rank `root_rank`, in place."""
    if is_distributed():
        _horovod().broadcast_parameters(model.state_dict(), root_rank=root_rank)


def barrier() -> None:
    """Return when every rank has come here."""
    if is_distributed():
        _horovod().barrier()


def once_per_host(work: Callable[[], Any]) -> None:
    """Let the first rank of each host do `work` while the host's other ranks wait for it.

    Args:
        work: called on local rank 0, in a thread of its own.

    Raises:
        Exception: on every rank, what `work` raised on any host.
    """
    if get_world_size() == 1:
        work()
        return
    problem: list[Exception] = []
    thread = threading.Thread(target=_run_and_keep_error, args=(work, problem), daemon=True)
    if get_local_rank() == 0:
        thread.start()
    # Horovod: a rank that waits in one long collective is taken for a stalled one, so the ranks ask
    # each other again and again.
    while reduce_sum(torch.tensor([float(thread.is_alive())]), "once_per_host").item() > 0:
        time.sleep(_SECONDS_BETWEEN_QUESTIONS)
    for error in gather_objects(problem[0] if problem else None, "once_per_host_errors"):
        if error is not None:
            raise error


def distributed_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    backward_passes_per_step: int = 1,
    settings: DistributedConfig | None = None,
) -> torch.optim.Optimizer:
    """Wrap `optimizer` so that gradients are averaged over the ranks while backward still runs.

    Args:
        optimizer: any torch optimizer, with no state yet: wrapping drops it.
        named_parameters: of the uncompiled model, the same names on every rank.
        backward_passes_per_step: backward passes whose gradients are summed before the reduction.
        settings: compression and reduction groups.

    Returns:
        The wrapped optimizer, or `optimizer` itself when Horovod is not initialised.
    """
    if not is_distributed():
        return optimizer
    settings, hvd = settings or DistributedConfig(), _horovod()
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=list(named_parameters),
        compression=getattr(hvd.Compression, settings.compression),
        backward_passes_per_step=backward_passes_per_step,
        groups=settings.reduction_groups or None,
    )


def synchronize(optimizer: torch.optim.Optimizer) -> None:
    """Wait until every gradient is averaged: before unscaling and clipping, never after."""
    if hasattr(optimizer, "synchronize"):
        optimizer.synchronize()


@contextmanager
def already_synchronized(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let `step()` inside use the gradients as they are, instead of reducing them a second time."""
    with optimizer.skip_synchronize() if hasattr(optimizer, "skip_synchronize") else nullcontext():
        yield


def is_lost_rank_error(error: BaseException) -> bool:
    """Return whether `error` is Horovod's report that another rank is gone."""
    return type(error).__name__ == "HorovodInternalError"


def _run_and_keep_error(work: Callable[[], Any], problem: list[Exception]) -> None:
    try:
        work()
    except Exception as error:
        problem.append(error)


def _rank_in_environment() -> str:
    """Return what Horovod wrote to the environment: `os.environ` is an older copy of it."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(b"HOROVOD_RANK").decode()


def _launched_size() -> str:
    return next((os.environ[name] for name in _LAUNCHER_VARIABLES if name in os.environ), "1")


def _export_settings(settings: DistributedConfig) -> None:
    """Set Horovod's variables that the launcher or the user has not set already."""
    wanted = {
        "HOROVOD_FUSION_THRESHOLD": int(settings.fusion_threshold_mb * MIB),
        "HOROVOD_CYCLE_TIME": settings.cycle_time_ms,
        "HOROVOD_STALL_CHECK_TIME_SECONDS": settings.stall_warning_seconds,
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": settings.stall_shutdown_seconds,
        "HOROVOD_GLOO_TIMEOUT_SECONDS": settings.gloo_timeout_seconds,
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, str(value))
    if settings.interface:
        os.environ.setdefault("HOROVOD_GLOO_IFACE", settings.interface)


@cache
def _say_once(message: str) -> None:
    print(f"note: {message}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
