"""The only door to Horovod: everything that differs between one process and many goes through here.

Each function does the right thing for one process, too, with Horovod absent or not initialised: a
reduction returns what it was given, a broadcast does nothing, the rank is 0 of 1.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from horovod_lm.utils.cli import command
from horovod_lm.utils.config import DistributedConfig
from horovod_lm.utils.errors import ConfigError, DistributedError
from horovod_lm.utils.machine import available_cores
from horovod_lm.utils.watchdog import Watchdog

MIB = 1024 * 1024
SECONDS_TO_BE_MISSED = 2  # beyond the Gloo timeout: the other ranks say that they lost one, not how
_SECONDS_BETWEEN_QUESTIONS = 0.1
_HOW_TO_INSTALL = f"run {command('horovod_lm.setup.install_horovod')}"
_GLOO_TIMEOUT = 30  # seconds, where nobody sets it
_REMOVED = "-1"  # the rank of a process whose host has left the job
# What launchers tell their processes; the first is horovodrun's, the others are MPI's.
_LAUNCHER_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@cache
def _horovod() -> Any:  # the module, which has no types, or None
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


@dataclass(frozen=True)
class DeviceChoice:
    """Where this rank trains, and how its gradients travel.

    Attributes:
        device: this rank's GPU, or the CPU.
        staged: whether gradients travel through CPU memory; the same on every rank.
        summary: the devices of all ranks in one line; the same on every rank.
    """

    device: torch.device
    staged: bool
    summary: str


def setup_horovod(
    require_distributed: bool = True,
    settings: DistributedConfig | None = None,
    device: str = "auto",
) -> tuple[int, int, int, bool]:
    """Initialise Horovod, set this rank's number of threads, and select its GPU.

    Args:
        require_distributed: True: Horovod must be there. False: without a launcher, or with Horovod
            absent, go on alone and say so once.
        settings: fusion, cycle time, threads and time limits; None: their defaults.
        device: "cpu" selects no GPU; as `training.device`.

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
    set_threads(settings, get_local_size())
    own = own_device(device, get_local_rank())
    if own.type == "cuda" and not elastic_launcher():  # elastic: see `find_place_on_machine`
        torch.cuda.set_device(own)
    return get_world_size(), get_rank(), get_local_rank(), own.type == "cuda"


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


def set_threads(settings: DistributedConfig, local_size: int) -> None:
    """Give this rank its share of its host's cores: more threads than cores only take turns."""
    if settings.threads_per_rank != "auto":
        torch.set_num_threads(settings.threads_per_rank)
    elif "OMP_NUM_THREADS" not in os.environ and (local_size > 1 or elastic_launcher()):
        torch.set_num_threads(max(1, available_cores() // local_size))


def own_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Return the device of one rank of this host, without asking the other ranks.

    Args:
        wanted: "auto", "cuda" or "cpu", as `training.device`.
        local_rank: its number on this host. Ranks beyond the last GPU share the GPUs.
    """
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def choose_device(wanted: str, local_rank: int) -> DeviceChoice:
    """Choose this rank's device and how gradients travel; every rank calls it.

    NCCL reduces gradients on the GPUs, where each rank of the job has a GPU of its own. It refuses
    two ranks on one GPU. Then, without NCCL, or with a rank on a CPU, gradients travel through CPU
    memory on every rank: see `StagedGradients`.

    Args:
        wanted: "auto": a GPU where torch sees one; "cuda"; "cpu".
        local_rank: this rank's number on its host.

    Raises:
        ConfigError: on every rank: "cuda" is wanted, and a rank has no GPU.
    """
    device = own_device(wanted, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Horovod: a gradient on the GPU of one rank and in the memory of another cannot be reduced, so
    # the ranks have to agree.
    ranks = gather_objects(_offer(device), name="devices")
    without = sorted({rank.host for rank in ranks if rank.gpu is None})
    if wanted == "cuda" and without:
        raise ConfigError(
            f"training.device is cuda, and torch sees no GPU on {', '.join(without)}: set it to"
            f" auto or cpu, or run {command('horovod_lm.setup.doctor')} there"
        )
    gpus = {rank.gpu: rank.gpu_name for rank in ranks if rank.gpu is not None}
    by_nccl = len(gpus) == len(ranks) and all(rank.has_nccl for rank in ranks)
    staged = bool(gpus) and is_distributed() and not by_nccl
    return DeviceChoice(device, staged, _summary(ranks, gpus, by_nccl))


class _Offer(NamedTuple):
    """What a rank tells the others of its device."""

    host: str
    gpu: str | None  # its UUID: a launcher may show each rank one GPU only, then each is number 0
    gpu_name: str | None
    has_nccl: bool


def _offer(device: torch.device) -> _Offer:
    has_nccl = is_distributed() and bool(_horovod().nccl_built())
    if device.type == "cpu":
        return _Offer(platform.node(), None, None, has_nccl)
    gpu = torch.cuda.get_device_properties(device)
    return _Offer(platform.node(), str(gpu.uuid), gpu.name, has_nccl)


def _summary(ranks: Sequence[_Offer], gpus: dict[str, str], by_nccl: bool) -> str:
    """Return the devices of all ranks, and how gradients travel, in one line."""
    who, threads = _count(len(ranks), "rank"), _count(torch.get_num_threads(), "thread")
    which = f"{_count(len(gpus), 'GPU')} ({', '.join(sorted(set(gpus.values())))})"
    on_gpus = sum(rank.gpu is not None for rank in ranks)
    if not gpus:
        return f"{who} on the CPU, {threads} each"
    if len(ranks) == 1:
        return f"{who} on {which}"
    if by_nccl:
        return f"{who} on {which}: gradients travel between the GPUs, by NCCL"
    if on_gpus < len(ranks):
        where = f"{on_gpus} of {who} on {which}, the others on the CPU"
    elif len(gpus) < len(ranks):
        where = f"{who} share {which}"
    else:
        where = f"{who} on {which}, Horovod without NCCL"
    return f"{where}: gradients travel through CPU memory"


def elastic_launcher() -> bool:
    """Return whether `horovodrun` started this process as one that may lose and gain ranks."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def hang_watchdog() -> AbstractContextManager[Any]:
    """Inside `with hang_watchdog():` a rank that stands still is killed, where horovodrun cannot.

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
    """Start `reduce_sum`; `finish_reduce_sum` waits for the result.

    Values on a GPU are copied to the CPU first, which waits for the work that they depend on. The
    reduction itself runs at the same time as that of the gradients, in a message of its own:
    Horovod never fuses float64 with float32.
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
    """Give every rank the parameters and buffers of rank `root_rank`, in place."""
    if not is_distributed():
        return
    state = model.state_dict()
    # Horovod: in CPU memory, where every build can broadcast, and several ranks of one GPU, too.
    copies = {name: tensor.cpu() for name, tensor in state.items()}
    _horovod().broadcast_parameters(copies, root_rank=root_rank)
    for name, tensor in state.items():
        tensor.copy_(copies[name])


def barrier() -> None:
    """Return when every rank has come here."""
    if is_distributed():
        _horovod().barrier()


def local_rank_zero_first(work: Callable[[], Any]) -> None:
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
    while reduce_sum(torch.tensor([float(thread.is_alive())]), "local_rank_zero_first").item() > 0:
        time.sleep(_SECONDS_BETWEEN_QUESTIONS)
    for error in gather_objects(problem[0] if problem else None, "once_per_host_errors"):
        if error is not None:
            raise error


def distributed_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    backward_passes_per_step: int = 1,
    settings: DistributedConfig | None = None,
    staged: bool = False,
) -> torch.optim.Optimizer:
    """Wrap `optimizer` so that gradients are averaged over the ranks while backward still runs.

    Args:
        optimizer: any torch optimizer, with no state yet: wrapping drops it.
        named_parameters: of the uncompiled model, the same names on every rank.
        backward_passes_per_step: backward passes whose gradients are summed before the reduction.
        settings: compression and reduction groups.
        staged: let gradients travel through CPU memory, as `choose_device` says.

    Returns:
        The wrapped optimizer, or `optimizer` itself when Horovod is not initialised.
    """
    if not is_distributed():
        return optimizer
    settings, hvd = settings or DistributedConfig(), _horovod()
    compression = getattr(hvd.Compression, settings.compression)
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=list(named_parameters),
        compression=StagedGradients(compression) if staged else compression,
        backward_passes_per_step=backward_passes_per_step,
        groups=settings.reduction_groups or None,
    )


class StagedGradients:
    """A Horovod compression that hands gradients over in CPU memory, wherever they are.

    Horovod calls `compress` on a gradient before it is reduced, and `decompress` on the result.

    Args:
        inner: a compression that runs first, on the gradient's own device, such as fp16: with it,
            there are fewer bytes to copy.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def compress(self, gradient: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return a copy in CPU memory, and what `decompress` needs."""
        small, context = self.inner.compress(gradient)
        # Page-locked memory is copied at the full speed of the bus, and without the CPU.
        copy = torch.empty(small.shape, dtype=small.dtype, pin_memory=small.is_cuda)
        # Horovod: Gloo reads the copy at once, so it has to be complete: not `non_blocking`.
        return copy.copy_(small), (gradient.device, context)

    def decompress(self, reduced: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the result on the gradient's device."""
        device, inner_context = context
        return self.inner.decompress(reduced.to(device, non_blocking=True), inner_context)


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
