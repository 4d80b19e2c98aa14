"""Elastic training: ranks die, hang, leave and join, and the run goes on without and with them.

    python -m horovod_lm.launch.elastic_hosts runs/hosts --workers 2      # prints the call

A *commit* is a checkpoint held in memory, by every rank, every `training.commit_interval` steps.
When the ranks change, those that are left wait for horovodrun to say who is who in the next world;
the newest commit is given to all, and each goes on from it exactly as a resumed run would. So
nothing here knows about models, optimizers or data: what resumes from a file, resumes from memory.

Horovod has such a state for torch, `hvd.elastic.TorchState`. It is not used: it gives the optimizer
to new ranks by `broadcast_optimizer_state`, which takes a step with zero gradients where there is
no state yet, and AdamW's decay then shrinks every parameter.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.elastic import State, run_fn
from horovod.common.exceptions import HostsUpdatedInterrupt

from horovod_lm.training.checkpoint import (
    checkpoint_name,
    copy_to_memory,
    map_tensors,
    write_checkpoint,
)
from horovod_lm.training.run_dir import RunFolder
from horovod_lm.training.run_logger import TrainingResult
from horovod_lm.training.trainer import Trainer, prepare_data_once_per_host
from horovod_lm.utils import distributed
from horovod_lm.utils.cli import EXIT_USER_ERROR, command
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DistributedError
from horovod_lm.utils.interrupts import StopRequest
from horovod_lm.utils.progress import ProgressLine
from horovod_lm.utils.watchdog import Watchdog

LOST, CHANGED, JOINED = "a rank was lost", "ranks left or joined", "this rank joined"


def run_elastic_training(
    config: Config, run_name: str, resume_checkpoint: str | Path | None = None
) -> TrainingResult:
    """Train as `config` says, on ranks that may come and go; `setup_horovod` comes before.

    Args:
        config: as for `run_distributed_training`.
        run_name: the run's folder under `runs/`, the same for every rank, also for later ones.
        resume_checkpoint: a checkpoint to go on from.

    Returns:
        What the run came to, the same on every rank that is there at the end.

    Raises:
        UserError: one sentence about a setting, the data or the checkpoint.
    """
    if not distributed.elastic_launcher():
        raise DistributedError(
            "--elastic needs horovodrun with --min-np and --host-discovery-script:"
            f" {command('horovod_lm.launch.elastic_hosts', 'runs/hosts')} prints the call"
        )
    limit = float(os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"])  # when the other ranks miss this one
    with StopRequest() as stop, Watchdog(limit, f"rank {hvd.rank()}"):
        state = ElasticState(config, run_name, resume_checkpoint, stop)
        return run_fn(train_in_this_world, state.wait_for_next_world)(state)


def train_in_this_world(state: ElasticState) -> TrainingResult:
    """Train from the newest commit to the end, or to the error that ends this world."""
    config, world_size, rank = state.config, hvd.size(), hvd.rank()
    local_rank, local_size = find_place_on_machine()
    distributed.set_threads(config.distributed, local_size)
    device = distributed.choose_device(config.training.device, local_rank)
    progress = ProgressLine(enabled=rank == 0)
    prepare_data_once_per_host(config, progress)
    resume = state.resume_checkpoint if state.content is None else state.content
    trainer = Trainer(config, rank, world_size, device, state.stop, resume, commits=state)
    trainer.open_logger(state.run_folder, progress, resuming=resume is not None)
    state.begin(trainer)
    try:
        return trainer.run()
    finally:
        trainer.logger.close()


class ElasticState(State):
    """What outlives a change of ranks: the newest commit, and how far the ranks had come.

    `run_fn` calls `sync` in each new world, `restore` when a rank was lost, and `commit` raises
    when horovodrun has seen hosts come or go.
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
        """Take on the trainer of a new world, and commit where it starts."""
        self.trainer = trainer
        if self.ranks_before:
            seconds = time.monotonic() - self.left_at
            trainer.logger.new_world(
                trainer.state, self.steps_lost, self.ranks_before, self.why, seconds
            )
        self.save()
        self.ranks_before = trainer.world_size

    def save(self) -> None:
        """Copy the trainer's state into memory, where training cannot change it."""
        assert self.trainer is not None  # `begin` comes first
        self.content = copy_to_memory(self.trainer.content())
        self.steps_taken = self.content["global_step"]

    def restore(self) -> None:
        """Leave the world in which a rank was lost; what it did since the commit is counted."""
        self.why, self.left_at = LOST, time.monotonic()
        if self.trainer is not None:
            self.steps_taken = self.trainer.state.global_step

    def sync(self) -> None:
        """Give every rank of a new world the newest commit that any of them holds."""
        self.trainer = None  # its hooks and memory belong to the world that is gone
        committed = -1 if self.content is None else self.content["global_step"]
        offers = distributed.gather_objects((committed, self.steps_taken), "commits")
        newest, _ = max(offers)
        if newest < 0:  # nobody has committed: everybody starts from the beginning
            return
        # A rank may be one commit behind, and one that joined has none.
        root_rank = [step for step, _ in offers].index(newest)
        before = distributed.broadcast_object(self.ranks_before, "ranks_before", root_rank)
        self.content = broadcast_content(self.content, root_rank)
        self.steps_lost = max(taken for _, taken in offers) - newest
        self.content["steps_replayed"] += self.steps_lost
        self.content["world_changes"] += 1
        self.steps_taken, self.ranks_before = newest, before

    def on_reset(self) -> None:
        """Keep the messages about hosts that came in meanwhile; Horovod would forget them."""

    def check_host_updates(self) -> None:
        """Raise `HostsUpdatedInterrupt` when hosts came or went, on all ranks at the same step."""
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            self.why, self.left_at = CHANGED, time.monotonic()
            # Horovod lets ranks skip `sync` when hosts only left. A rank that joins at the same
            # time does not skip it, and both wait for ever (horovod#3494).
            raise HostsUpdatedInterrupt(skip_sync=False) from None

    def wait_for_next_world(self) -> None:
        """Leave this world; return in the next one, or end if there is none within the time.

        Raises:
            SystemExit: this rank's host is no longer listed.
        """
        with self.grace_period(self.config.training.elastic_timeout_seconds):
            hvd.shutdown()
            distributed.join_world()

    @contextmanager
    def grace_period(self, seconds: float) -> Iterator[None]:
        """Save the newest commit and end this process if the block takes longer than `seconds`."""
        timer = threading.Timer(seconds, self.give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def give_up(self) -> None:
        """Save the newest commit, say so, and end: the main thread waits inside Horovod."""
        seconds = self.config.training.elastic_timeout_seconds
        saved = self.save_to_disk()
        where = f"saved {saved}" if saved else "nothing was committed yet"
        print(
            f"error: too few ranks are left, and none joined for {seconds} s; {where}; to go on:"
            f" start the same call again with --resume {shlex.quote(str(self.run_folder.run_dir))}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_USER_ERROR)

    def save_to_disk(self) -> Path | None:
        """Write the newest commit as a checkpoint; every rank that is left writes the same."""
        if self.content is None:
            return None
        name = checkpoint_name(self.content["epoch"], self.content["global_step"])
        return write_checkpoint(self.content, self.run_folder.checkpoint_dir / name)


def broadcast_content(content: Any, root_rank: int) -> Any:
    """Return rank `root_rank`'s commit on every rank, bit for bit, one tensor at a time.

    Pickled whole it would need its size three times over, and Horovod refuses 2 GiB and more.
    """
    is_root = hvd.rank() == root_rank
    plan = map_tensors(content, lambda tensor: tensor.to("meta")) if is_root else None
    plan = distributed.broadcast_object(plan, "commit_plan", root_rank)
    own: list[torch.Tensor] = []
    if is_root:
        map_tensors(content, own.append)
    numbers, sources = count(), iter(own)

    def transfer(place: torch.Tensor) -> torch.Tensor:
        tensor = next(sources) if is_root else torch.empty(place.shape, dtype=place.dtype)
        # As bytes: Gloo reduces few types, but it carries all.
        hvd.broadcast_(tensor.reshape(-1).view(torch.uint8), root_rank, f"commit.{next(numbers)}")
        return tensor

    return map_tensors(plan, transfer)


def find_place_on_machine() -> tuple[int, int]:
    """Return this rank's number on its machine, and how many ranks are there.

    Horovod counts by host name, and elastic ranks on one machine need a name each: see
    `horovod_lm.launch.elastic_hosts`. They share cores and GPUs all the same.
    """
    own = (platform.node(), socket.gethostbyname(os.environ["HOROVOD_HOSTNAME"]))
    machines = distributed.gather_objects(own, "machines")
    return machines[: hvd.rank()].count(own), machines.count(own)
