"""What a training run says and writes down: progress for people, metrics for the tools."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from horovod_lm.training.evaluate import Evaluation, perplexity
from horovod_lm.training.metrics import MetricsRecorder, StepTimer
from horovod_lm.training.run_dir import RunFolder
from horovod_lm.utils.cli import command, program, shown
from horovod_lm.utils.config import Config
from horovod_lm.utils.distributed import barrier, elastic_launcher, gather_objects
from horovod_lm.utils.progress import ProgressLine, format_seconds


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to. Losses are nats per token, over all ranks."""

    run_name: str
    run_dir: Path
    steps: int
    stopped: bool  # by the user, before the end
    first_loss: float  # training loss of the run's first step
    train_loss: float  # of its last step
    validation_loss: float
    perplexity: float  # exp of the validation loss
    tokens_per_second: float  # of all ranks together, over this session's training steps
    seconds: float  # of this session
    checkpoint: Path | None  # the last one written
    nats_per_story: float | None = None  # source stories: on whole stories that were held out
    entropy_per_story: float | None = None  # the best that any model can reach
    world_size: int = 1  # ranks at the end
    world_changes: int = 0  # times that ranks left or joined an elastic run
    steps_replayed: int = 0  # steps that an elastic run lost with a rank, and took again


@dataclass
class TrainState:
    """How far a run has come: what a checkpoint holds besides model and optimizer."""

    epoch: int = 0
    step: int = 0  # optimizer steps in this epoch
    samples_seen: int = 0  # blocks of this epoch, by all ranks together
    global_step: int = 0  # optimizer steps since the start
    tokens: int = 0  # tokens predicted since the start, by all ranks together
    loss: float = float("nan")
    first_loss: float = float("nan")
    best_loss: float = float("inf")
    world_changes: int = 0  # times that ranks left or joined an elastic run
    steps_replayed: int = 0  # steps that an elastic run lost with a rank, and took again


class RunLogger:
    """One rank's report of a run: rank 0 speaks for all, every rank writes its own JSON lines.

    Args:
        config: written to the run's folder.
        run: where.
        rank: this process's number.
        world_size: number of ranks.
        devices: the devices of all ranks, in one line.
        progress: where rank 0 speaks.
        resume_step: the step that a resumed run goes on from; None for a new run. A new run sets
            an earlier one of the same name aside.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        rank: int,
        world_size: int,
        devices: str,
        progress: ProgressLine,
        resume_step: int | None,
    ) -> None:
        self.config, self.run, self.world_size, self.progress = config, run, world_size, progress
        self.devices = devices
        if rank == 0:
            earlier = run.archive_existing_run() if resume_step is None else None
            if earlier is not None:
                progress.say(f"an earlier run of this name is now {shown(earlier)}")
            run.describe(config, world_size, devices)
        barrier()  # Horovod: no rank may write into a folder that is about to be renamed
        # Horovod: what horovodrun calls each rank's host; asked now, while all ranks are there.
        host = os.environ.get("HOROVOD_HOSTNAME", platform.node())
        self._hosts = gather_objects(host, name="hosts_of_ranks")
        self.recorder = MetricsRecorder(
            run.run_dir, run.log_dir, run.tensorboard_dir, rank, resume_step
        )
        self._started = time.perf_counter()
        self._steps = self._tokens = 0
        self._training_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since this session began."""
        return time.perf_counter() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Mean rate of this session's training steps, all ranks together."""
        return self._tokens / max(self._training_seconds, 1e-9)

    def announce(self, model: torch.nn.Module, kind: torch.dtype, at: int, total: int) -> None:
        """Say what is about to be trained, on what, and from where."""
        self.recorder.event("start", pid=os.getpid(), step=at, total_steps=total)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.progress.say(
            f"{shown(self.run.run_dir)}: {parameters:,} parameters, {str(kind).split('.')[-1]},"
            f" {self.devices}"
        )
        if at:
            self.progress.say(f"going on at step {at} of {total}")

    def new_world(
        self, state: TrainState, lost: int, ranks_before: int, why: str, seconds: float
    ) -> None:
        """Say that an elastic run goes on with other ranks, and from where."""
        self.recorder.event(
            "new_world",
            step=state.global_step,
            ranks_before=ranks_before,
            ranks=self.world_size,
            steps_lost=lost,
            why=why,
            seconds=round(seconds, 3),  # since this rank learnt of it
        )
        replayed = f"; {lost} step{'s are' if lost > 1 else ' is'} taken again" if lost else ""
        self.progress.say(
            f"{why}: {ranks_before} -> {self.world_size} ranks, going on after step"
            f" {state.global_step}{replayed}"
        )

    def step(
        self,
        state: TrainState,
        total_steps: int,
        timer: StepTimer,
        tokens: int,
        learning_rate: float,
        gradient_norm: float,
    ) -> None:
        """Record one optimizer step of all ranks."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        self._training_seconds += timer.elapsed
        self._record(
            "train",
            state,
            state.loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            tokens_per_second=tokens / timer.elapsed,
            **timer.seconds,
        )
        left = (total_steps - state.global_step) * self._training_seconds / self._steps
        due = state.global_step % self.config.training.log_interval == 0
        self.progress.update(
            f"step {state.global_step}/{total_steps}  loss {state.loss:.4f}"
            f"  rate {learning_rate:.2e}  {self.tokens_per_second:,.0f} tokens/s"
            f"  {format_seconds(left)} left",
            keep=due or self._steps == 1,
        )

    def validation(self, state: TrainState, result: Evaluation, is_best: bool) -> None:
        """Record one evaluation of all ranks."""
        self._record("validation", state, result.loss, accuracy=result.accuracy)
        self.progress.say(
            f"step {state.global_step}: validation loss {result.loss:.4f}, perplexity"
            f" {result.perplexity:.2f}, accuracy {result.accuracy:.1%}"
            f"{' (best)' if is_best else ''}"
        )

    def stories(self, nats_per_story: float, entropy: float) -> None:
        """Record how near the model comes to the best that is possible."""
        self.recorder.event("stories", nats_per_story=nats_per_story, entropy_per_story=entropy)
        self.progress.say(
            f"whole stories: {nats_per_story:.2f} nats each, the best possible is {entropy:.2f}:"
            f" {nats_per_story / entropy - 1:+.1%}"
        )

    def interrupted(self, why: str, state: TrainState, saved: Path) -> None:
        """Say where training stands, what was saved, and how to go on."""
        self.progress.say(f"{why} after step {state.global_step}; saved {shown(saved)}")
        call = call_to_go_on(self.config, self.run.run_dir, self._hosts, elastic_launcher())
        self.progress.say(f"to go on: {call}")

    def close(self) -> None:
        """Finish the files."""
        self.recorder.close()

    def _record(self, phase: str, state: TrainState, loss: float, **values: float) -> None:
        self.recorder.record(
            phase,
            epoch=state.epoch,
            step=state.global_step,
            world_size=self.world_size,
            steps_replayed=state.steps_replayed,
            tokens=state.tokens,
            loss=loss,
            perplexity=perplexity(loss),
            **values,
        )


def call_to_go_on(config: Config, run_dir: Path, hosts: Sequence[str], elastic: bool) -> str:
    """Return what to type to go on with a run, on as many ranks and on the same hosts.

    Args:
        config: the run's.
        run_dir: its folder.
        hosts: the name of each rank's host, in the order of ranks.
        elastic: whether ranks may come and go: then horovodrun's call is the user's own.
    """
    if elastic:
        return f"start the same call again with --resume {shlex.quote(shown(run_dir))}"
    resume = ("horovod_lm.train", "--resume", run_dir)
    horovodrun = [program("horovodrun"), "-np", str(len(hosts))]
    slots = Counter(hosts)
    if len(slots) == 1:
        return command(*resume, under=horovodrun if len(hosts) > 1 else ())
    if config.distributed.hosts:  # then port, key and interface stand there, too
        settings = ["--config", str(run_dir / "config.yaml"), "--run", "--"]
        cluster = [program("python"), "-m", "horovod_lm.launch.hosts", *settings]
        return command(*resume, under=cluster)
    named = ",".join(f"{name}:{count}" for name, count in slots.items())
    return command(*resume, under=[*horovodrun, "-H", named])
