"""Elastic training: the run continues when ranks fail, hang, leave or join.

    python -m horovod_lm.launch.elastic_hosts runs/hosts --workers 2      # prints the call

Every `training.commit_interval` steps each rank makes a *commit*: a checkpoint in its memory. When
the ranks change, the remaining ones wait until horovodrun has numbered the ranks of the next world.
One rank then broadcasts the newest commit, and all resume from it as from a checkpoint's file.

Horovod's own state for torch, `hvd.elastic.TorchState`, is not used: its
`broadcast_optimizer_state` takes a step with zero gradients on ranks without optimizer state, and
AdamW's weight decay then shrinks every parameter.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
from horovod.common.elastic import State, run_fn
from horovod.common.exceptions import HostsUpdatedInterrupt

from horovod_lm.training.checkpoint import checkpoint_name, write_checkpoint
from horovod_lm.training.run_dir import RunFolder
from horovod_lm.training.run_logger import TrainingResult, resume_command
from horovod_lm.training.trainer import Trainer, prepare_data_once_per_host, read_on_rank_0
from horovod_lm.utils import distributed
from horovod_lm.utils.cli import EXIT_USER_ERROR, command
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import CheckpointError, DistributedError
from horovod_lm.utils.interrupts import StopRequest
from horovod_lm.utils.progress import ProgressLine
from horovod_lm.utils.watchdog import Watchdog

LOST, CHANGED, JOINED = "a rank was lost", "ranks left or joined", "this rank joined"


def run_elastic_training(
    config: Config, run_name: str, resume_checkpoint: str | Path | None = None
) -> TrainingResult:
    """Train a model on ranks that may fail, leave and join; call `setup_horovod` first.

    Arguments, result and errors as for `run_distributed_training`. Ranks that join later need the
    same `run_name`, and the same configuration or run's folder on their host.
    """
    if not distributed.elastic_launcher():
        raise DistributedError(
            "--elastic needs horovodrun with --min-np and --host-discovery-script:"
            f" {command('horovod_lm.launch.elastic_hosts', 'runs/hosts')} prints the call"
        )
    limit = float(os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"])  # the other ranks wait so long
    with StopRequest() as stop, Watchdog(limit, f"rank {hvd.rank()}", lambda: stop.saving()):
        state = ElasticState(config, run_name, resume_checkpoint, stop)
        return run_fn(train_in_this_world, state.wait_for_next_world)(state)


def train_in_this_world(state: ElasticState) -> TrainingResult:
    """Train from the newest commit to the end, or until the ranks change."""
    config, world_size, rank = state.config, hvd.size(), hvd.rank()
    local_rank, local_size = find_place_on_machine()
    distributed.set_threads(config.distributed, local_size)
    device = distributed.agree_on_devices(config.training.device, local_rank)
    progress = ProgressLine(enabled=rank == 0)
    resume, name = state.content, None
    if resume is None and state.resume_checkpoint is not None:
        resume, name = read_on_rank_0(state.resume_checkpoint), state.resume_checkpoint
    prepare_data_once_per_host(config, progress, resume)
    trainer = Trainer(
        config, state.run_folder, rank, world_size, device, progress, state.stop, resume, name,
        state.commit,
    )  # fmt: skip
    state.begin(trainer)
    try:
        return trainer.run()
    finally:
        trainer.close()


class ElasticState(State):
    """What survives a change of ranks: the newest commit, and the number of steps taken.

    `run_fn` calls `restore` when a rank was lost, then `sync` in the new world. `commit` calls
    `save`, and raises when horovodrun has found that hosts joined or left.
    """

    def __init__(
        self,
        config: Config,
        run_name: str,
        resume_checkpoint: str | Path | None,
        stop: StopRequest,
    ) -> None:
        super().__init__(
            bcast_object=lambda value: distributed.broadcast_object(value, "host_updates"),
            get_rank=hvd.rank,
        )
        self.config, self.stop, self.resume_checkpoint = config, stop, resume_checkpoint
        self.run_folder = RunFolder.of(config, run_name)
        self.content: dict[str, Any] | None = None  # the newest commit
        self.trainer: Trainer | None = None
        self.steps_taken = self.steps_lost = self.ranks_before = 0
        self.why, self.left_at = JOINED, time.monotonic()

    def begin(self, trainer: Trainer) -> None:
        """Begin to train in a new world with a commit."""
        self.trainer = trainer
        if self.ranks_before:
            seconds = time.monotonic() - self.left_at
            trainer.logger.new_world(
                trainer.state, self.steps_lost, self.ranks_before, self.why, seconds
            )
        self.save()
        self.ranks_before = trainer.world_size

    def save(self) -> None:
        """Copy the trainer's state, so that training does not change the commit."""
        assert self.trainer is not None  # `begin` comes first
        self.content = distributed.map_tensors(
            self.trainer.content(), lambda tensor: tensor.detach().to("cpu", copy=True)
        )
        self.steps_taken = self.content["global_step"]

    def restore(self) -> None:
        """Note that a rank was lost, and the steps taken since the commit."""
        self.why, self.left_at = LOST, time.monotonic()
        if self.trainer is not None:
            self.steps_taken = self.trainer.state.global_step

    def sync(self) -> None:
        """Give every rank of a new world the newest commit of any rank."""
        self.trainer = None  # its hooks and memory belong to the previous world
        committed = -1 if self.content is None else self.content["global_step"]
        offers = distributed.gather_objects((committed, self.steps_taken), "commits")
        newest, _ = max(offers)
        if newest < 0:  # no rank has committed: all start from the beginning
            return
        # A rank may be one commit behind, and one that joined has none.
        root_rank = [step for step, _ in offers].index(newest)
        before = distributed.broadcast_object(self.ranks_before, "ranks_before", root_rank)
        self.content = distributed.broadcast_object(self.content, "commit", root_rank)
        self.steps_lost = max(taken for _, taken in offers) - newest
        self.content["steps_replayed"] += self.steps_lost
        self.content["world_changes"] += 1
        self.steps_taken, self.ranks_before = newest, before

    def on_reset(self) -> None:
        """Keep the messages about hosts that arrived meanwhile; Horovod would drop them."""

    def check_host_updates(self) -> None:
        """Raise `HostsUpdatedInterrupt` on all ranks at the same step when hosts have changed."""
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            self.why, self.left_at = CHANGED, time.monotonic()
            # Horovod lets ranks skip `sync` when hosts only left. A rank that joins at the same
            # time does not skip it, and all of them hang (horovod#3494).
            raise HostsUpdatedInterrupt(skip_sync=False) from None

    def wait_for_next_world(self) -> None:
        """Leave this world; return in the next one, or end the process after the time limit."""
        # In a thread, because the main thread waits inside Horovod.
        timer = threading.Timer(self.config.training.elastic_timeout_seconds, self.give_up)
        timer.daemon = True
        timer.start()
        try:
            hvd.shutdown()
            distributed.join_world()
        finally:
            timer.cancel()

    def give_up(self) -> None:
        """Save the newest commit, say so, and end the process."""
        seconds = self.config.training.elastic_timeout_seconds
        saved, resume = "nothing was committed yet: start the run again", ""
        if self.content is not None:  # every remaining rank writes the same
            name = checkpoint_name(self.content["epoch"], self.content["global_step"])
            try:
                path = write_checkpoint(self.content, self.run_folder.checkpoint_dir / name)
                saved = f"saved {path}"
                call = resume_command(self.config, self.run_folder.run_dir, (), elastic=True)
                resume = f"; to resume: {call}"
            except CheckpointError as error:  # in a thread: the process must end all the same
                saved = str(error)
        print(
            f"error: too few ranks are left, and none joined for {seconds} s; {saved}{resume}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_USER_ERROR)


def find_place_on_machine() -> tuple[int, int]:
    """Return this rank's number on its machine, and the number of ranks there.

    Horovod counts ranks by host name, and elastic ranks on one machine need a name each: see
    `horovod_lm.launch.elastic_hosts`. They share the machine's cores and GPUs.
    """
    own = (platform.node(), socket.gethostbyname(os.environ["HOROVOD_HOSTNAME"]))
    machines = distributed.gather_objects(own, "machines")
    return machines[: hvd.rank()].count(own), machines.count(own)
