"""What a training run prints and records."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.evaluate import Evaluation, perplexity
from horovod_lm.training.metrics import MetricsRecorder
from horovod_lm.training.run_dir import RunFolder, lock_run
from horovod_lm.utils.cli import command, program, shown
from horovod_lm.utils.config import Config
from horovod_lm.utils.distributed import elastic_launcher, gather_objects, on_rank_0
from horovod_lm.utils.machine import bfloat16_peak
from horovod_lm.utils.progress import ProgressLine, format_seconds


@dataclass(frozen=True)
class TrainingResult:
    """The results of a run. Losses are in nats per token, over all ranks."""

    run_dir: Path
    steps: int
    stopped: bool  # by the user, before the last step
    first_loss: float  # training loss of the run's first step
    train_loss: float  # of its last step
    validation_loss: float
    perplexity: float  # exp of the validation loss
    tokens_per_second: float  # of all ranks together, over this session's training steps
    seconds: float  # of this session
    checkpoint: Path | None  # the last one written


@dataclass
class TrainState:
    """The progress of a run; part of every checkpoint."""

    epoch: int = 0
    step: int = 0  # optimizer steps in this epoch
    samples_seen: int = 0  # blocks of this epoch, on all ranks together
    global_step: int = 0  # optimizer steps since the start
    tokens: int = 0  # predicted tokens since the start, on all ranks together
    loss: float = float("nan")
    first_loss: float = float("nan")
    best_loss: float = float("inf")
    world_changes: int = 0  # times that ranks left or joined an elastic run
    steps_replayed: int = 0  # steps that an elastic run lost with a rank and repeated


class RunLogger:
    """Prints the progress of a run on rank 0, and records metrics on every rank.

    It writes `config` to the run's folder, beside `devices`, those of all ranks in one line.
    `resume_step` is the step to resume from; None: a new run, and an existing one is renamed.
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
        self._open = ExitStack()  # rank 0's lock of the folder, and the files
        # Horovod: horovodrun's names of the hosts; gathered now, while no rank is lost.
        host = os.environ.get("HOROVOD_HOSTNAME", platform.node())
        self._hosts = gather_objects(host, name="hosts_of_ranks")
        try:
            # Horovod: no rank writes into a folder before rank 0 has renamed it.
            on_rank_0(lambda: self._open_folder(is_new=resume_step is None), "open_folder")
        except BaseException:
            self._open.close()
            raise
        self.recorder = MetricsRecorder(
            run.run_dir, run.log_dir, run.tensorboard_dir, rank, resume_step
        )
        self._open.callback(self.recorder.close)
        self._started = time.perf_counter()
        self._steps = self._tokens = 0
        self._training_seconds = 0.0
        self._utilization = 0.0  # of the GPUs, for each token per second; 0: not known

    def _open_folder(self, is_new: bool) -> None:
        """Rename an earlier run's folder, and make this one's; only this process trains in it."""
        earlier = self.run.archive_existing_run() if is_new else None
        if earlier is not None:
            self.progress.say(f"an earlier run of this name is now {shown(earlier)}")
        self._open.enter_context(lock_run(self.run))
        self.run.describe(self.config, self.world_size, self.devices)

    @property
    def seconds(self) -> float:
        """Seconds since this session began."""
        return time.perf_counter() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Mean of this session's training steps, all ranks together."""
        return self._tokens / max(self._training_seconds, 1e-9)

    def announce(self, model: TransformerLM, dtype: torch.dtype, at: int, total: int) -> None:
        """Report the model, the devices, and the step to start from."""
        self.recorder.event("start", pid=os.getpid(), step=at, total_steps=total)
        self.progress.say(
            f"{shown(self.run.run_dir)}: {model.num_parameters():,} parameters,"
            f" {str(dtype).split('.')[-1]}, {self.devices}"
        )
        if peak := bfloat16_peak(next(model.parameters()).device):
            self._utilization = model.flops_per_token() / (peak * self.world_size)
        if at:
            self.progress.say(f"resuming at step {at} of {total}")

    def new_world(
        self, state: TrainState, lost: int, ranks_before: int, why: str, seconds: float
    ) -> None:
        """Report that the ranks of an elastic run have changed, and the step to resume from."""
        self.recorder.event(
            "new_world",
            step=state.global_step,
            ranks_before=ranks_before,
            ranks=self.world_size,
            steps_lost=lost,
            why=why,
            seconds=round(seconds, 3),  # since this rank detected the change
        )
        repeated = f"; steps to repeat: {lost}" if lost else ""
        self.progress.say(
            f"{why}: {ranks_before} -> {self.world_size} ranks, resuming after step"
            f" {state.global_step}{repeated}"
        )

    def step(
        self,
        state: TrainState,
        total_steps: int,
        seconds: float,
        parts: dict[str, float],
        tokens: int,
        learning_rate: float,
        gradient_norm: float,
    ) -> None:
        """Record one optimizer step of all ranks, its seconds, and those of its parts.

        On GPUs whose peak is known, the model FLOPs utilization (MFU) too, as a fraction of 1.
        """
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        self._training_seconds += seconds
        self._record(
            "train",
            state,
            state.loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            tokens_per_second=tokens / seconds,
            **parts,
            **({"mfu": self._utilization * tokens / seconds} if self._utilization else {}),
        )
        mfu = self._utilization * self.tokens_per_second
        left = (total_steps - state.global_step) * self._training_seconds / self._steps
        due = state.global_step % self.config.training.log_interval == 0
        self.progress.update(
            f"step {state.global_step}/{total_steps}  loss {state.loss:.4f}"
            f"  rate {learning_rate:.2e}  {self.tokens_per_second:,.0f} tokens/s"
            f"{f'  MFU {mfu:.0%}' if mfu else ''}"
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
        """Record nats per held-out story beside the lower bound for any model."""
        self.recorder.event("stories", nats_per_story=nats_per_story, entropy_per_story=entropy)
        self.progress.say(
            f"held-out stories: {nats_per_story:.2f} nats each, the lower bound is {entropy:.2f}:"
            f" {nats_per_story / entropy - 1:+.1%}"
        )

    def interrupted(self, why: str, state: TrainState, saved: Path) -> None:
        """Report the step, the checkpoint, and the command that resumes the run."""
        self.progress.say(f"{why} after step {state.global_step}; saved {shown(saved)}")
        self.progress.say(self.how_to_resume())

    def how_to_resume(self, checkpoint: Path | None = None) -> str:
        """Return the line that says how to resume the run, and on which of several hosts."""
        call = resume_command(
            self.config, self.run.run_dir, self._hosts, elastic_launcher(), checkpoint
        )
        where = f", on {self._hosts[0]}" if len(set(self._hosts)) > 1 else ""
        return f"to resume{where}: {call}"

    def close(self) -> None:
        """Close the files, and let other processes train in the run's folder."""
        self._open.close()

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


def resume_command(
    config: Config,
    run_dir: Path,
    hosts: Sequence[str],
    elastic: bool,
    checkpoint: Path | None = None,
) -> str:
    """Return the command that resumes a run with as many ranks on the same hosts.

    `hosts` names the host of each rank. `checkpoint` is one of the run's; None: the newest.
    """
    options: list[str | Path] = ["--resume", checkpoint or run_dir]
    if checkpoint and checkpoint.parent.parent != run_dir:
        options += ["--config", run_dir / "config.yaml", "--run-name", run_dir.name]
    if elastic or "SLURM_STEP_NUM_TASKS" in os.environ:  # only the user knows the call
        words = shlex.join(shown(one) if isinstance(one, Path) else one for one in options)
        return f"start the same call again with {words}"
    horovodrun = [program("horovodrun"), "-np", str(len(hosts))]
    slots = Counter(hosts)
    if len(slots) == 1:
        return command("horovod_lm.train", *options, under=horovodrun if len(hosts) > 1 else ())
    if config.distributed.hosts:  # the configuration also has the port, key and interface
        settings = ["--config", str(run_dir / "config.yaml"), "--run", "--"]
        cluster = [program("python"), "-m", "horovod_lm.launch.hosts", *settings]
        return command("horovod_lm.train", *options, under=cluster)
    named = ",".join(f"{name}:{count}" for name, count in slots.items())
    return command("horovod_lm.train", *options, under=[*horovodrun, "-H", named])
