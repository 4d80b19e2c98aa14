"""What would more workers do? A cost model of ring allreduce, fitted to measurements here.

The ring (https://arxiv.org/abs/1802.05799, after Patarasu and Yuan, 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002) sends 2(N-1) messages of 1/N of the data from each of N
workers to the next, all at the same time:

    seconds = 2 (N - 1) latency  +  2 (N - 1) / N  bytes / bandwidth

The second term hardly grows with N: that is why the ring scales. The first one does.

    network = fit_network(measurements)                      # latency and bandwidth of this machine
    job = Job(parameters=124e6, seconds_per_step=0.4)
    step(job, network, workers=1024).efficiency
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BYTES_PER_GRADIENT = 4  # float32
# Of a step's arithmetic: forward one part, backward two (https://arxiv.org/abs/2001.08361, 2.1).
BACKWARD_SHARE = 2 / 3
GBIT = 1e9 / 8  # bytes


@dataclass(frozen=True)
class Network:
    """One kind of link.

    Attributes:
        latency: seconds that one message takes however short it is.
        bandwidth: bytes per second that a worker sends while it receives as many.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.latency < 0 or self.bandwidth <= 0:
            raise ValueError(
                f"latency {self.latency} s and bandwidth {self.bandwidth} bytes/s:"
                " the first must not be negative, the second must be above zero"
            )

    def allreduce_seconds(self, size: float, workers: int) -> float:
        """The time in which a ring of workers sums `size` bytes of each of them."""
        if workers <= 1:
            return 0.0
        steps = 2 * (workers - 1)
        return steps * self.latency + steps / workers * size / self.bandwidth


@dataclass(frozen=True)
class Measurement:
    """One measured allreduce.

    Attributes:
        size: bytes that each worker brings.
        workers: how many there are.
        seconds: the time from the first call to the last return.
    """

    size: float
    workers: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """What each worker does in a step, however many there are (weak scaling).

    Attributes:
        parameters: how many gradients are reduced.
        seconds_per_step: of arithmetic, on one worker, with nobody to wait for.
        overlap: share of the backward pass during which gradients already travel, 0 to 1. Horovod
            starts as soon as the first gradients are there.
        passes: backward passes per reduction (gradient accumulation), inside `seconds_per_step`.
        bytes_per_gradient: 4 for float32, 2 with fp16 compression.
    """

    parameters: float
    seconds_per_step: float
    overlap: float = 1.0
    passes: int = 1
    bytes_per_gradient: float = BYTES_PER_GRADIENT

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is {self.overlap}: a share of the backward pass is 0 to 1")

    @property
    def bytes_reduced(self) -> float:
        """What each worker brings to the allreduce of one step."""
        return self.parameters * self.bytes_per_gradient

    @property
    def seconds_to_hide_behind(self) -> float:
        """The part of the last backward pass in which gradients can travel unnoticed."""
        return self.overlap * BACKWARD_SHARE * self.seconds_per_step / self.passes


@dataclass(frozen=True)
class Step:
    """A predicted step of all workers together.

    Attributes:
        seconds: from one update to the next.
        communication: seconds that the allreduce takes.
        exposed: the part of it that nothing hides.
        efficiency: speed of each worker as a share of its speed alone, 0 to 1.
    """

    seconds: float
    communication: float
    exposed: float
    efficiency: float


def step(
    job: Job,
    network: Network,
    workers: int,
    workers_per_host: int = 1,
    inside: Network | None = None,
) -> Step:
    """Predict a step of `workers` that each do what `job` says.

    Args:
        job: the arithmetic and the gradients.
        network: the link between hosts; all workers of a host share it.
        workers: how many, all together.
        workers_per_host: how many of them are on one host.
        inside: the link within a host; None: not the bottleneck.

    Returns:
        The prediction. It knows nothing of workers that are late now and then, of other traffic on
        the network, or of the time to negotiate: real steps are slower.
    """
    hosts = -(-workers // workers_per_host)
    # Inside each host first, between the hosts next, and inside again: NCCL's rings do as much.
    communication = network.allreduce_seconds(job.bytes_reduced, hosts)
    if inside is not None:
        neighbours = min(workers, workers_per_host)
        communication += inside.allreduce_seconds(job.bytes_reduced, neighbours)
    exposed = max(0.0, communication - job.seconds_to_hide_behind)
    seconds = job.seconds_per_step + exposed
    efficiency = job.seconds_per_step / seconds if seconds else 1.0
    return Step(seconds, communication, exposed, efficiency)


def smallest_batch(
    seconds_per_sample: float,
    job: Job,
    network: Network,
    workers: int,
    workers_per_host: int = 1,
    inside: Network | None = None,
) -> float:
    """The batch per worker at which communication is just hidden; below it, communication wins.

    Args:
        seconds_per_sample: of arithmetic, on one worker.
        job: its gradients and overlap; its own `seconds_per_step` does not matter.
        network: the link between the hosts.
        workers: how many.
        workers_per_host: how many of them are on one host.
        inside: the link within a host; None: not the bottleneck.

    Returns:
        Samples per worker and pass: where the time of the allreduce equals the part of the backward
        pass that hides it. Infinite where nothing is hidden.
    """
    hidden_per_sample = job.overlap * BACKWARD_SHARE * seconds_per_sample
    communication = step(job, network, workers, workers_per_host, inside).communication
    return communication / hidden_per_sample if hidden_per_sample else float("inf")


def fit_network(measurements: Iterable[Measurement]) -> Network:
    """Fit latency and bandwidth to measured allreduces.

    The relative errors are made small, not the absolute ones: else the largest message alone would
    decide, and the latency would be anything.

    Raises:
        ValueError: fewer than two sizes of more than one worker were measured, which leaves one of
            the two numbers open; or the times do not grow with the size.
    """
    rows = [one for one in measurements if one.workers > 1]
    if len({one.size for one in rows}) < 2:
        raise ValueError(
            "fit_network needs allreduces of at least two sizes, of two or more workers"
        )
    seconds = np.array([one.seconds for one in rows])
    steps = np.array([2.0 * (one.workers - 1) for one in rows])
    moved = steps / [one.workers for one in rows] * [one.size for one in rows]
    terms = np.stack([steps, moved], axis=1) / seconds[:, None]
    latency, per_byte = np.linalg.lstsq(terms, np.ones(len(rows)), rcond=None)[0]
    if latency < 0:  # more than the data can tell: then there is none to be seen
        latency, moved_only = 0.0, terms[:, 1]
        per_byte = moved_only.sum() / (moved_only @ moved_only)
    if per_byte <= 0:
        raise ValueError("the measured times do not grow with the size: measure larger messages")
    return Network(float(latency), float(1 / per_byte))


def relative_errors(network: Network, measurements: Iterable[Measurement]) -> list[float]:
    """How far each prediction is from its measurement, as a share of the measurement."""
    return [
        network.allreduce_seconds(one.size, one.workers) / one.seconds - 1 for one in measurements
    ]


def curve(
    job: Job,
    network: Network,
    workers: Sequence[int],
    workers_per_host: int = 1,
    inside: Network | None = None,
) -> list[Step]:
    """Predict a step for each number of workers."""
    return [step(job, network, count, workers_per_host, inside) for count in workers]


def breaking_point(
    job: Job,
    network: Network,
    workers_per_host: int = 1,
    inside: Network | None = None,
    efficiency: float = 0.9,
    most: int = 2**20,
) -> int | None:
    """Find the smallest number of workers that are less efficient than they should be.

    Args:
        job: the arithmetic and the gradients.
        network: the link between hosts.
        workers_per_host: how many workers are on one host.
        inside: the link within a host; None: not the bottleneck.
        efficiency: the least that is good enough, 0 to 1.
        most: where to stop looking.

    Returns:
        The number, or None if even `most` workers are efficient enough.
    """

    def breaks(workers: int) -> bool:
        return step(job, network, workers, workers_per_host, inside).efficiency < efficiency

    if not breaks(most):
        return None
    # Each worker more makes the ring longer, and never faster: halving the range finds the first.
    return bisect.bisect_left(range(most + 1), True, lo=1, key=breaks)


def flops_per_token(
    parameters: float, n_layers: int = 0, d_model: int = 0, context: int = 0
) -> float:
    """Arithmetic of one token's forward and backward pass: 6 for each parameter, and attention's.

    Args:
        parameters: without the position embeddings, which are only looked up.
        n_layers: with the others, adds attention over `context` tokens, 12 n_layers d_model context
            (https://arxiv.org/abs/2204.02311, appendix B).
        d_model: width.
        context: tokens that a token sees.
    """
    return 6 * parameters + 12 * n_layers * d_model * context
