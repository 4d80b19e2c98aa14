"""A cost model of data-parallel training with ring allreduce, fitted to measurements.

The ring (https://arxiv.org/abs/1802.05799, after Patarasu and Yuan, 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002) sends 2(N-1) messages of 1/N of the data from each of N
workers to the next:

    seconds = 2 (N - 1) latency  +  2 (N - 1) / N  bytes / bandwidth

The bandwidth term is almost independent of N, which is why the ring scales; the latency term grows.

    network = fit_network(measurements)                      # latency and bandwidth of this machine
    job = Job(parameters=124e6, seconds_per_step=0.4)
    step(job, network, workers=1024).efficiency

Arguments of all predictions: `network` is the link between hosts, which the workers of a host
share; `workers` is the total number; `workers_per_host` of them are on each host; `inside` is the
link within a host (None: not a bottleneck).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Share of a step's arithmetic: forward 1/3, backward 2/3 (https://arxiv.org/abs/2001.08361, 2.1).
BACKWARD_SHARE = 2 / 3
GBIT = 1e9 / 8  # bytes


@dataclass(frozen=True)
class Network:
    """One kind of link."""

    latency: float  # seconds per message, independent of its size
    bandwidth: float  # bytes per second that a worker sends while it receives as many

    def allreduce_seconds(self, size: float, workers: int) -> float:
        """Return the seconds of a ring allreduce of `size` bytes per worker."""
        if workers <= 1:
            return 0.0
        steps = 2 * (workers - 1)
        return steps * self.latency + steps / workers * size / self.bandwidth


@dataclass(frozen=True)
class Measurement:
    """A measured allreduce of `size` bytes per worker; seconds from first call to last return."""

    size: float
    workers: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """The work of each worker in one step, independent of their number (weak scaling).

    `overlap` is the fraction of the backward pass during which gradients can be sent, 0 to 1:
    Horovod starts as soon as the first gradients are ready.
    """

    parameters: float  # number of gradients that are reduced
    seconds_per_step: float  # arithmetic of one worker, without communication
    overlap: float = 1.0
    passes: int = 1  # backward passes per reduction (gradient accumulation), in `seconds_per_step`
    bytes_per_gradient: float = 4  # float32; 2 with fp16 compression

    @property
    def bytes_reduced(self) -> float:
        """Bytes per worker in the allreduce of one step."""
        return self.parameters * self.bytes_per_gradient

    @property
    def overlap_seconds(self) -> float:
        """Seconds of the last backward pass that overlap with communication."""
        return self.overlap * BACKWARD_SHARE * self.seconds_per_step / self.passes


@dataclass(frozen=True)
class Step:
    """A predicted step."""

    seconds: float  # duration of the step
    communication: float  # seconds of the allreduce
    exposed: float  # seconds of communication that do not overlap with computation
    efficiency: float  # speed of each worker relative to one worker alone, 0 to 1


def step(
    job: Job,
    network: Network,
    workers: int,
    workers_per_host: int = 1,
    inside: Network | None = None,
) -> Step:
    """Predict one step.

    The model has no stragglers, no other traffic and no negotiation: real steps are slower.
    """
    hosts = -(-workers // workers_per_host)
    # Hierarchical, like NCCL's rings: within each host, then between hosts.
    communication = network.allreduce_seconds(job.bytes_reduced, hosts)
    if inside is not None:
        local_workers = min(workers, workers_per_host)
        communication += inside.allreduce_seconds(job.bytes_reduced, local_workers)
    exposed = max(0.0, communication - job.overlap_seconds)
    seconds = job.seconds_per_step + exposed
    efficiency = job.seconds_per_step / seconds if seconds else 1.0
    return Step(seconds, communication, exposed, efficiency)


def curve(
    job: Job,
    network: Network,
    workers: Sequence[int],
    workers_per_host: int = 1,
    inside: Network | None = None,
) -> list[Step]:
    """Predict a step for each number of workers."""
    return [step(job, network, count, workers_per_host, inside) for count in workers]


def smallest_batch(
    seconds_per_sample: float,
    job: Job,
    network: Network,
    workers: int,
    workers_per_host: int = 1,
    inside: Network | None = None,
) -> float:
    """Return the smallest batch per worker whose backward pass hides the communication.

    It is in samples per pass, and infinite without overlap. `seconds_per_sample` is the arithmetic
    of one sample on one worker; `job.seconds_per_step` is not used.
    """
    hidden_per_sample = job.overlap * BACKWARD_SHARE * seconds_per_sample
    communication = step(job, network, workers, workers_per_host, inside).communication
    return communication / hidden_per_sample if hidden_per_sample else float("inf")


def breaking_point(
    job: Job,
    network: Network,
    workers_per_host: int = 1,
    inside: Network | None = None,
    efficiency: float = 0.9,
    most: int = 2**20,
) -> int | None:
    """Return the smallest number of workers with less than `efficiency`; None if above `most`."""

    def breaks(workers: int) -> bool:
        return step(job, network, workers, workers_per_host, inside).efficiency < efficiency

    if not breaks(most):
        return None
    # Efficiency never increases with the number of workers, so bisection finds the first.
    return bisect.bisect_left(range(most + 1), True, lo=1, key=breaks)


def fit_network(measurements: Iterable[Measurement]) -> Network:
    """Fit latency and bandwidth to measured allreduces by least squares of the relative errors.

    With absolute errors the largest message would determine the fit, and the latency would be
    arbitrary.

    Raises:
        ValueError: fewer than two sizes with more than one worker, or the times do not grow with
            the size.
    """
    rows = [one for one in measurements if one.workers > 1]
    if len({one.size for one in rows}) < 2:
        raise ValueError("fit_network needs at least two sizes measured with two or more workers")
    seconds = np.array([one.seconds for one in rows])
    steps = np.array([2.0 * (one.workers - 1) for one in rows])
    moved = steps / [one.workers for one in rows] * [one.size for one in rows]
    terms = np.stack([steps, moved], axis=1) / seconds[:, None]
    latency, per_byte = np.linalg.lstsq(terms, np.ones(len(rows)), rcond=None)[0]
    if latency < 0:  # below what the data can resolve
        latency, moved_only = 0.0, terms[:, 1]
        per_byte = moved_only.sum() / (moved_only @ moved_only)
    if per_byte <= 0:
        raise ValueError("the measured times do not grow with the size: measure larger messages")
    return Network(float(latency), float(1 / per_byte))


def relative_errors(network: Network, measurements: Iterable[Measurement]) -> list[float]:
    """Return (prediction - measurement) / measurement for each measurement."""
    return [
        network.allreduce_seconds(one.size, one.workers) / one.seconds - 1 for one in measurements
    ]


def flops_per_token(
    parameters: float, n_layers: int = 0, d_model: int = 0, context: int = 0
) -> float:
    """Return the FLOPs of one token's forward and backward pass: 6 per parameter, plus attention.

    `parameters` is without the position embeddings, which are only looked up; `context` is in
    tokens (https://arxiv.org/abs/2204.02311, appendix B).
    """
    return 6 * parameters + 12 * n_layers * d_model * context
