"""Calls of Horovod: what differs between one process and many (elastic training adds its own).

Every function also works in one process, with Horovod absent or not initialised: a reduction
returns its argument, a broadcast does nothing, the rank is 0 of 1.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from horovod_lm.utils.cli import command, program
from horovod_lm.utils.config import DistributedConfig
from horovod_lm.utils.errors import ConfigError, DistributedError, UserError
from horovod_lm.utils.interrupts import StopRequest
from horovod_lm.utils.machine import available_cores
from horovod_lm.utils.progress import plural
from horovod_lm.utils.watchdog import Watchdog

MIB = 1024 * 1024
MAX_BROADCAST_BYTES = 1024 * MIB  # per message: Horovod counts a message's elements in 32 bits
_SECONDS_AFTER_GLOO_TIMEOUT = 2  # by then the other ranks have reported the lost rank
_POLLING_SECONDS = 0.1
_HOW_TO_INSTALL = f"run {command('horovod_lm.setup.install_horovod')}"
_GLOO_TIMEOUT = 30  # seconds; Horovod's default
_REMOVED = "-1"  # the rank of a process whose host has left the job
# The number of ranks as launchers tell it: horovodrun, Open MPI, other MPIs, MVAPICH, srun.
_LAUNCHER_VARIABLES = (
    "HOROVOD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


@cache
def _horovod() -> Any:  # the module, which has no types, or None
    """Return `horovod.torch`, or None where it is not installed or does not load."""
    try:
        import horovod.torch as hvd
    except ModuleNotFoundError:
        return None
    except Exception as error:  # a build for another torch raises OSError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _print_once(f"Horovod is installed but does not load ({reason}): {_HOW_TO_INSTALL}")
        return None
    return hvd


def is_distributed() -> bool:
    """Return whether Horovod is initialised in this process, at any world size, 1 included."""
    # Horovod: before init() every query raises ValueError, so each helper asks this first.
    hvd = sys.modules.get("horovod.torch")
    return hvd is not None and bool(hvd.is_initialized())


def started_by_launcher() -> bool:
    """Return whether `horovodrun`, `mpirun` or `srun` started this process as one of its ranks."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES)


def _launched_size() -> tuple[int, str]:
    """Return the number of ranks that the launcher started, and the variable that has it."""
    for name in _LAUNCHER_VARIABLES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name]), name
    return 1, ""


def setup_horovod(
    require_distributed: bool = True,
    settings: DistributedConfig | None = None,
    device: str = "auto",
) -> tuple[int, int, int, bool]:
    """Initialise Horovod, set this rank's number of threads, and select its GPU.

    Args:
        require_distributed: True: Horovod must be installed. False: without a launcher, or without
            Horovod, continue in one process and say so once.
        settings: fusion, cycle time, threads and time limits; None: their defaults.
        device: as `training.device`; "cpu" selects no GPU.

    Returns:
        `(world_size, rank, local_rank, use_cuda)`.

    Raises:
        DistributedError: Horovod is missing, and required or needed for several ranks; or it has
            not connected the ranks that the launcher started.
    """
    settings = settings or DistributedConfig()
    launched, variable = _launched_size()
    if _horovod() is None:
        if require_distributed or launched > 1:
            raise DistributedError(
                f"Horovod is not installed for torch {torch.__version__}: {_HOW_TO_INSTALL}"
            )
        _print_once("Horovod is not installed: training alone, in one process")
    elif require_distributed or started_by_launcher():
        _export_settings(settings)  # Horovod: it reads its settings when it starts
        join_world()
    if launched > 1 and launched != get_world_size() and not elastic_launcher():
        horovodrun = [program("horovodrun"), "-np", str(launched)]
        raise DistributedError(
            f"this process was started as one of {launched} ({variable}), but Horovod sees"
            f" {get_world_size()}: start it with {shlex.join(horovodrun)}, which this build of"
            f" Horovod needs; if it is meant to run alone, unset {variable}"
        )
    set_threads(settings, get_local_size())
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda and not elastic_launcher():  # elastic: see `find_place_on_machine`
        torch.cuda.set_device(choose_device(local_rank=get_local_rank()))
    return get_world_size(), get_rank(), get_local_rank(), use_cuda


def join_world() -> None:
    """Initialise Horovod: return when all ranks have connected.

    Elastic ranks connect again whenever the ranks change. They retry when a rank was lost meanwhile
    or was so late that the others had timed out.

    Raises:
        DistributedError: a rank did not connect within the Gloo timeout.
        SystemExit: horovodrun has removed this elastic rank's host from the job.
    """
    while not is_distributed():
        try:
            _horovod().init()  # Horovod: elastic: also asks horovodrun for a rank
        except ValueError:
            if not elastic_launcher():
                seconds = os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]
                raise DistributedError(
                    f"not every rank was there within {seconds} s: the first rank whose output ends"
                    " in an error says why (distributed.gloo_timeout_seconds sets the time)"
                ) from None
            if _rank_in_environment() == _REMOVED:
                host = os.environ["HOROVOD_HOSTNAME"]
                print(f"{host} is no longer listed: its rank leaves the job", flush=True)
                raise SystemExit(0) from None
            _horovod().shutdown()


def set_threads(settings: DistributedConfig, local_size: int) -> None:
    """Give this rank its share of the host's cores: more threads than cores would take turns."""
    if settings.threads_per_rank != "auto":
        torch.set_num_threads(settings.threads_per_rank)
    elif "OMP_NUM_THREADS" not in os.environ and (local_size > 1 or elastic_launcher()):
        torch.set_num_threads(max(1, available_cores() // local_size))


def choose_device(wanted: torch.device | str | None = None, local_rank: int = 0) -> torch.device:
    """Return the device for one process; ranks beyond the last GPU share the GPUs.

    `wanted` is "cpu", "cuda", "cuda:1" ...: the CPU, with a note, if there is no such GPU. None or
    "auto" is a GPU if there is one.

    Raises:
        ConfigError: torch has no device of this name.
    """
    if wanted in (None, "auto"):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"{wanted!r} is no device: use cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        _print_once(f"there is no {device} here: the CPU is used")
        return torch.device("cpu")
    return device


@dataclass(frozen=True)
class DeviceChoice:
    """This rank's device, and where its gradients are reduced."""

    device: torch.device
    staged: bool  # gradients are reduced in CPU memory; the same on every rank
    summary: str  # the devices of all ranks in one line


def agree_on_devices(wanted: str, local_rank: int) -> DeviceChoice:
    """Choose this rank's device and how gradients are reduced; a collective call.

    NCCL reduces them on the GPUs if each rank has a GPU of its own; it refuses two ranks on one.
    Otherwise every rank copies its gradients to CPU memory: see `StagedGradients`. `wanted` is
    `training.device`: every rank raises ConfigError if it is "cuda" and a rank has no GPU.
    """
    device = choose_device("cpu" if wanted == "cpu" else "auto", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Horovod: a gradient on one rank's GPU and in another rank's memory cannot be reduced.
    ranks = gather_objects(_describe_rank(device), name="devices")
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


class _Rank(NamedTuple):
    """A rank's device, as the other ranks see it."""

    host: str
    gpu: str | None  # its UUID: numbers repeat where a launcher shows each rank one GPU only
    gpu_name: str
    has_nccl: bool


def _describe_rank(device: torch.device) -> _Rank:
    uuid, name = None, ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        uuid, name = str(gpu.uuid), gpu.name
    return _Rank(platform.node(), uuid, name, is_distributed() and bool(_horovod().nccl_built()))


def _summary(ranks: Sequence[_Rank], gpus: Mapping[str, str], by_nccl: bool) -> str:
    """Return the devices of all ranks, and how gradients are reduced, in one line."""
    who = plural(len(ranks), "rank")
    if not gpus:
        return f"{who} on the CPU, {plural(torch.get_num_threads(), 'thread')} each"
    cpu = " and the CPU" if any(rank.gpu is None for rank in ranks) else ""
    where = f"{who} on {plural(len(gpus), 'GPU')} ({', '.join(sorted(set(gpus.values())))}){cpu}"
    if len(ranks) == 1:
        return where
    return f"{where}, gradients reduced {'by NCCL' if by_nccl else 'in CPU memory'}"


def elastic_launcher() -> bool:
    """Return whether `horovodrun` started this process as an elastic rank."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def hang_watchdog(stop: StopRequest) -> AbstractContextManager[Any]:
    """Return a context in which this rank is killed if it hangs; a process alone is not."""
    if get_world_size() == 1:
        return nullcontext()
    limit = float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", _GLOO_TIMEOUT))
    limit += _SECONDS_AFTER_GLOO_TIMEOUT
    return Watchdog(limit, f"rank {get_rank()}", lambda: stop.saving())


def shutdown() -> None:
    """End Horovod in this process, if it was started."""
    if is_distributed():
        _horovod().shutdown()


def get_rank() -> int:
    """Return this process's number among all ranks; 0 in one process."""
    return _horovod().rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of ranks; 1 in one process."""
    return _horovod().size() if is_distributed() else 1


def get_local_rank() -> int:
    """Return this process's number among the ranks of its host; 0 in one process."""
    return _horovod().local_rank() if is_distributed() else 0


def get_local_size() -> int:
    """Return the number of ranks on this host; 1 in one process."""
    return _horovod().local_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which prints and writes files for all ranks."""
    return get_rank() == 0


def reduce_sum(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return the sum of `values` over all ranks, in float64, on the CPU.

    Their shape, and the `name` of the reduction, are the same on every rank.
    """
    return finish_reduce_sum(start_reduce_sum(values, name)).cpu()


def start_reduce_sum(values: torch.Tensor, name: str) -> Any:
    """Start `reduce_sum`; `finish_reduce_sum` waits for the result.

    Values on a GPU are copied to the CPU first, which waits for the work that they depend on. The
    reduction then overlaps with that of the gradients. One process copies nothing and waits for
    nothing.
    """
    values = values.detach().to(torch.float64)
    if not is_distributed():
        return values
    values = values.cpu()
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
    """Return rank `root_rank`'s `value` on every rank: any picklable value of any size.

    Tensors in nested dicts, lists and tuples are sent one by one, and arrive on the CPU: Horovod's
    own `broadcast_object` pickles all of them into one message, which must be below 2 GiB.
    """
    if not is_distributed():
        return value
    hvd = _horovod()
    is_root = hvd.rank() == root_rank
    tensors: list[torch.Tensor] = []
    # A tensor on the device "meta" has a shape and a type, but no data.
    outline = map_tensors(value, lambda tensor: tensor.to("meta")) if is_root else None
    # Horovod: messages are matched by name.
    outline = hvd.broadcast_object(outline, root_rank=root_rank, name=name)
    map_tensors(value if is_root else outline, tensors.append)
    if not is_root:
        tensors = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    handles = []
    for number, tensor in enumerate(tensors):
        # As bytes, because Gloo does not know every type: (...,) -> (bytes,)
        data = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        for start in range(0, len(data), MAX_BROADCAST_BYTES):
            part = data[start : start + MAX_BROADCAST_BYTES]
            handles.append(hvd.broadcast_async_(part, root_rank, f"{name}.{number}.{start}"))
    for handle in handles:
        hvd.synchronize(handle)
    received = iter(tensors)
    return value if is_root else map_tensors(outline, lambda _: next(received))


def on_rank_0(work: Callable[[], Any], name: str) -> Any:
    """Call `work` on rank 0; return its result, or raise its `UserError`, on every rank."""
    result = error = None
    if is_main_process():
        try:
            result = work()
        except UserError as problem:
            error = problem
    # Horovod: if rank 0 alone raised the error, the others would wait for its broadcast.
    result, error = broadcast_object((result, error), name)
    if error is not None:
        raise error
    return result


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Apply `function` to each tensor in nested dicts, lists and tuples, always in one order."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def gather_objects(value: Any, name: str) -> list[Any]:
    """Return every rank's `value`, in the order of ranks, on every rank."""
    return _horovod().allgather_object(value, name=name) if is_distributed() else [value]


def broadcast_parameters(model: torch.nn.Module, root_rank: int = 0) -> None:
    """Give every rank the parameters and buffers of rank `root_rank`, in place."""
    if not is_distributed():
        return
    state = model.state_dict()
    # Horovod: in CPU memory, where every build can broadcast, also for ranks that share a GPU.
    copies = {name: tensor.cpu() for name, tensor in state.items()}
    _horovod().broadcast_parameters(copies, root_rank=root_rank)
    for name, tensor in state.items():
        tensor.copy_(copies[name])


def local_rank_zero_first(work: Callable[[], Any]) -> None:
    """Run `work` on the first rank of each host, in a thread; the host's other ranks wait.

    Every rank raises the first exception that `work` raised on any host.
    """
    if get_world_size() == 1:
        work()
        return
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    if get_local_rank() == 0:
        thread.start()
    # Horovod: one long collective would count as a stalled rank, so the ranks poll.
    while reduce_sum(torch.tensor([float(thread.is_alive())]), "local_rank_zero_first").item() > 0:
        time.sleep(_POLLING_SECONDS)
    for error in gather_objects(errors[0] if errors else None, "local_rank_zero_errors"):
        if error is not None:
            raise error


def distributed_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    backward_passes_per_step: int = 1,
    settings: DistributedConfig | None = None,
    staged: bool = False,
) -> torch.optim.Optimizer:
    """Wrap `optimizer` so that gradients are averaged over the ranks during the backward pass.

    The gradients of `backward_passes_per_step` passes are summed first; `staged` reduces them in
    CPU memory, see `agree_on_devices`. The names are those of the uncompiled model, the same on
    every rank. Wrapping discards the optimizer's state. When Horovod is not initialised,
    `optimizer` itself is returned.
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
    """A Horovod compression that reduces gradients in CPU memory, whatever their device.

    Horovod calls `compress` on a gradient before it is reduced, and `decompress` on the result.
    `inner` is another compression, such as fp16, which runs on the gradient's device.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def compress(self, gradient: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return a copy in CPU memory, and the context for `decompress`."""
        small, context = self.inner.compress(gradient)
        # Copies to page-locked memory run at the bus's full speed.
        copy = torch.empty(small.shape, dtype=small.dtype, pin_memory=small.is_cuda)
        # Horovod: Gloo reads the copy at once, so the copy must not be `non_blocking`.
        return copy.copy_(small), (gradient.device, context)

    def decompress(self, reduced: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the result on the gradient's device."""
        device, inner_context = context
        return self.inner.decompress(reduced.to(device, non_blocking=True), inner_context)


def synchronize(optimizer: torch.optim.Optimizer) -> None:
    """Wait until every gradient is averaged: before unscaling and clipping, never after."""
    if hasattr(optimizer, "synchronize"):
        optimizer.synchronize()


def already_synchronized(optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
    """Return a context in which `step()` does not reduce the gradients a second time."""
    return getattr(optimizer, "skip_synchronize", nullcontext)()


def is_lost_rank_error(error: BaseException) -> bool:
    """Return whether `error` is Horovod's report that another rank was lost."""
    return type(error).__name__ == "HorovodInternalError"


def _rank_in_environment() -> str:
    """Return HOROVOD_RANK as Horovod's C code set it, which `os.environ` does not show."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(b"HOROVOD_RANK").decode()


def _export_settings(settings: DistributedConfig) -> None:
    """Set Horovod's environment variables, except those that are already set."""
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
def _print_once(message: str) -> None:
    print(f"note: {message}", file=sys.stderr, flush=True)
