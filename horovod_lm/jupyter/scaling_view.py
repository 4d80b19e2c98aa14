"""A cluster as the scaling lab shows it: plain numbers and words, from the cost model alone."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from horovod_lm.scaling import (
    GBIT,
    Job,
    Measurement,
    Network,
    Step,
    breaking_point,
    flops_per_token,
    smallest_batch,
    step,
)
from horovod_lm.utils.errors import UserError

INSIDE = Network(latency=5e-6, bandwidth=25e9)  # what GPUs of a node reach over PCIe 4.0 x16
GOOD_ENOUGH = 0.9  # efficiency; what Horovod published for its best models
MICROSECOND = 1e-6
BEYOND_THE_BURST = 2**20  # bytes


@dataclass(frozen=True)
class Choices:
    """What the sliders say.

    Attributes:
        parameters: of the model.
        batch: sequences that a worker reads in a step.
        workers: how many, all together.
        workers_per_host: GPUs per node; they share the node's link.
        gigabits_per_second: bandwidth of a node's link.
        microseconds: latency of a message between nodes.
        overlap: share of the backward pass during which gradients already travel, 0 to 1.
        teraflops: arithmetic that a worker really reaches, in 10^12 operations per second.
        tokens_per_sequence: how long a sequence is.
    """

    parameters: float = 124e6
    batch: int = 16
    workers: int = 64
    workers_per_host: int = 4
    gigabits_per_second: float = 10.0
    microseconds: float = 20.0
    overlap: float = 0.8
    teraflops: float = 50.0
    tokens_per_sequence: int = 512

    @property
    def seconds_per_sequence(self) -> float:
        """Arithmetic of one sequence on one worker, forward and backward."""
        flops = flops_per_token(self.parameters) * self.tokens_per_sequence
        return flops / (self.teraflops * 1e12)

    @property
    def job(self) -> Job:
        """The work of each worker."""
        return Job(self.parameters, self.batch * self.seconds_per_sequence, self.overlap)

    @property
    def network(self) -> Network:
        """The link between nodes."""
        return Network(self.microseconds * MICROSECOND, self.gigabits_per_second * GBIT)


@dataclass(frozen=True)
class Prediction:
    """What the cost model says of some choices.

    Attributes:
        step: the step of all workers together.
        arithmetic: seconds of it that a worker calculates.
        tokens_per_second: of all workers together.
        breaks_at: the first number of workers below the efficiency asked for; None: it holds.
        smallest_batch: sequences per worker from which on communication is hidden; infinite where
            nothing can hide.
        latency_share: part of the allreduce between nodes that latency takes, 0 to 1; None where
            all workers are on one node.
    """

    step: Step
    arithmetic: float
    tokens_per_second: float
    breaks_at: int | None
    smallest_batch: float
    latency_share: float | None


def predict(
    choices: Choices, inside: Network | None = INSIDE, good_enough: float = GOOD_ENOUGH
) -> Prediction:
    """Predict a step, and where the choices stop to scale.

    Args:
        choices: the job and the cluster.
        inside: the link between the workers of one node; None: not the bottleneck.
        good_enough: the least efficiency that counts as scaling, 0 to 1.
    """
    job, network = choices.job, choices.network
    placed = choices.workers_per_host, inside
    found = step(job, network, choices.workers, *placed)
    hosts = -(-choices.workers // choices.workers_per_host)
    between = network.allreduce_seconds(job.bytes_reduced, hosts)
    tokens = choices.workers * choices.batch * choices.tokens_per_sequence
    return Prediction(
        step=found,
        arithmetic=job.seconds_per_step,
        tokens_per_second=tokens / found.seconds,
        breaks_at=breaking_point(job, network, *placed, good_enough),
        smallest_batch=smallest_batch(
            choices.seconds_per_sequence, job, network, choices.workers, *placed
        ),
        latency_share=network.allreduce_seconds(0, hosts) / between if hosts > 1 else None,
    )


def sentences(choices: Choices, found: Prediction, good_enough: float = GOOD_ENOUGH) -> list[str]:
    """Say in words where the choices break and what would help."""
    said = []
    if found.breaks_at is None:
        said.append(f"It does not break: however many workers, efficiency is {good_enough:.0%} up.")
    else:
        said.append(
            f"It breaks at {found.breaks_at:,} workers: from there on, efficiency is below"
            f" {good_enough:.0%}."
        )
    if choices.workers == 1:
        said.append("One worker waits for nobody.")
    elif found.smallest_batch == float("inf"):
        said.append("Without overlap nothing hides the communication, whatever the batch.")
    else:
        state = "hidden" if found.step.exposed == 0 else "not all hidden"
        said.append(
            f"With {choices.workers:,} workers, communication hides behind the backward pass from"
            f" {found.smallest_batch:,.1f} sequences per worker on; at {choices.batch:,} it is"
            f" {state}."
        )
    if found.latency_share is None:
        said.append("All workers are on one node: nothing crosses the network.")
    else:
        share = found.latency_share
        wins, part = ("Latency", share) if share > 0.5 else ("Bandwidth", 1 - share)
        said.append(f"{wins} takes {part:.0%} of the allreduce between nodes.")
    return said


def read_measurements(
    path: str | Path, megabits_per_second: int, smallest: float = BEYOND_THE_BURST
) -> list[Measurement]:
    """Read the allreduces that tests/benchmarks/allreduce_over_links.py measured over one link.

    Args:
        path: its CSV file.
        megabits_per_second: the rate of the link.
        smallest: bytes; shorter messages are left out. The benchmark's links let 256 KiB pass at
            once before they hold to their rate, so short messages say nothing of it.

    Raises:
        UserError: the file cannot be read, or holds nothing of that rate.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        rates = {int(row["megabits_per_second"]) for row in rows}
        found = [
            Measurement(float(row["bytes"]), int(row["workers"]), float(row["seconds"]))
            for row in rows
            if int(row["megabits_per_second"]) == megabits_per_second
            and float(row["bytes"]) >= smallest
        ]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no table of measured allreduces: {error}") from None
    if not found:
        raise UserError(
            f"{path} holds no allreduce at {megabits_per_second} Mbit/s: choose one of"
            f" {', '.join(map(str, sorted(rates)))}"
        )
    return found
