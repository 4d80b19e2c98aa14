"""The training loop, for one process or many Horovod ranks.

    horovodrun -np 2 python -m horovod_lm.train --config configs/tiny.yaml
    python -m horovod_lm.train --config configs/tiny.yaml        # the same loop, one process

Every line that exists only because training is distributed carries the tag `# Horovod:`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from horovod_lm.data import get_dataloaders, load_tokenizer, prepare_data
from horovod_lm.models.loss import IGNORE_INDEX
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.checkpoint import (
    BEST,
    FINAL,
    check_same_model,
    checkpoint_content,
    checkpoint_name,
    read_checkpoint,
    remove_old_checkpoints,
    restore,
    write_checkpoint,
)
from horovod_lm.training.evaluate import Evaluation, evaluate, score_texts
from horovod_lm.training.host_check import check_hosts_agree
from horovod_lm.training.metrics import StepTimer
from horovod_lm.training.optimizer import (
    autocast,
    build_optimizer,
    build_scaler,
    build_scheduler,
    choose_amp_dtype,
)
from horovod_lm.training.run_dir import RunFolder, default_run_name
from horovod_lm.training.run_logger import RunLogger, TrainingResult, TrainState
from horovod_lm.utils import distributed
from horovod_lm.utils.config import Config
from horovod_lm.utils.distributed import DeviceChoice
from horovod_lm.utils.errors import CheckpointError, LostRankError
from horovod_lm.utils.interrupts import StopRequest
from horovod_lm.utils.progress import ProgressLine

HELD_OUT_STORIES = 256  # scored at the end; the standard error of their mean is about 1 %


def run_distributed_training(
    config: Config,
    rank: int,
    world_size: int,
    local_rank: int,
    resume_checkpoint: str | Path | None = None,
    run_name: str | None = None,
) -> TrainingResult:
    """Train as `config` says; every rank calls this with the same arguments.

    Prepares the data if that has not been done. A run of the same name that is not resumed is
    renamed, never overwritten. Ctrl-C stops every rank after the step in progress, and saves.

    Args:
        config: see `configs/`; every key is explained there.
        rank: this process's number among `world_size`, as `setup_horovod` gives it.
        world_size: number of ranks, 1 included.
        local_rank: this process's number on its host: it decides which GPU is its own.
        resume_checkpoint: a checkpoint to go on from, at any world size.
        run_name: the run's folder under `runs/`; default: a new one with the time in its name.

    Returns:
        What the run came to, the same on every rank.

    Raises:
        UserError: one sentence about a setting, the data or the checkpoint.
        LostRankError: another rank is gone; rank 0 has saved where training stood.
    """
    # Horovod: ranks that did not agree on a name would write into two folders.
    run_name = distributed.broadcast_object(run_name or default_run_name(), name="run_name")
    # Horovod: a GPU for each rank where there are enough; all ranks agree how gradients travel.
    device = distributed.choose_device(config.training.device, local_rank)
    progress = ProgressLine(enabled=rank == 0)
    prepare_data_once_per_host(config, progress)
    # Horovod: on another host nobody else ends a rank that stands still.
    with StopRequest() as stop, distributed.hang_watchdog():
        trainer = Trainer(config, rank, world_size, device, stop, resume_checkpoint)
        trainer.open_logger(RunFolder.of(config, run_name), progress, resume_checkpoint is not None)
        try:
            return trainer.run()
        except Exception as error:
            if distributed.is_lost_rank_error(error):
                raise trainer.another_rank_is_gone(error) from error
            raise
        finally:
            trainer.logger.close()


class Commits(Protocol):
    """What elastic training asks of the loop; see `horovod_lm.training.elastic`."""

    def commit(self) -> None:
        """Keep where training stands: the point to go back to when a rank is lost."""


class Trainer:
    """One rank's share of a training run.

    Args:
        config: see `configs/`.
        rank: this process's number among `world_size`.
        world_size: number of ranks.
        device: where this rank trains, and how its gradients travel.
        stop: tells whether the user wants the run to end.
        resume: where to go on: a checkpoint's file, which rank 0 reads, or its content, which every
            rank holds.
        commits: who keeps the commits of elastic training.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        world_size: int,
        device: DeviceChoice,
        stop: StopRequest,
        resume: str | Path | Mapping[str, Any] | None = None,
        commits: Commits | None = None,
    ) -> None:
        self.config, self.training, self.stop = config, config.training, stop
        self.commits = commits
        self.rank, self.world_size = rank, world_size
        self.device, self.device_choice = device.device, device
        self.amp_dtype = choose_amp_dtype(config.training, self.device)
        self._build()
        self._load(resume)

    def _build(self) -> None:
        """Build data, model and optimizer, the same on every rank but for the shard of the data."""
        config = self.config
        # Horovod: each rank reads its own part of every batch.
        self.train_loader, self.validation_loader = get_dataloaders(
            config, self.rank, self.world_size
        )
        self.sampler = self.train_loader.batch_sampler
        self.num_samples = len(self.train_loader.dataset)
        self.tokenizer = load_tokenizer(config.resolve(config.data.data_dir) / "tokenizer.json")
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.tokenizer.eot_id)
        self.model.to(self.device, getattr(torch, config.training.dtype))
        # Horovod: wrapping comes before loading, because it drops the optimizer's state.
        self.optimizer = distributed.distributed_optimizer(
            build_optimizer(self.model, config.training),
            self.model.named_parameters(),
            config.training.gradient_accumulation_steps,
            config.distributed,
            self.device_choice.staged,
        )
        self.scaler = build_scaler(self.device, self.amp_dtype)
        self.forward = torch.compile(self.model) if config.training.compile else self.model

    def _load(self, resume: str | Path | Mapping[str, Any] | None) -> None:
        """Load where the run stood, give every rank the same, and set the schedule to it."""
        self.state = TrainState()
        if isinstance(resume, Mapping):
            self._restore(resume, "the last commit")
        elif resume is not None:
            # Horovod: only rank 0's disk need hold the checkpoint; the others get it over the wire.
            self._restore(on_rank_0(lambda: read_checkpoint(resume), "checkpoint"), resume)
        # Horovod: parameters last, so that every rank starts from the same bits.
        distributed.broadcast_parameters(self.model)
        self.total_steps = self._count_total_steps()
        self.scheduler = build_scheduler(
            self.optimizer,
            self.training,
            self.total_steps,
            self.world_size,
            self.state.global_step,
        )

    def _restore(self, checkpoint: Mapping[str, Any], name: str | Path) -> None:
        check_same_model(checkpoint, self.config, name)
        scaler = self.scaler if self.scaler.is_enabled() else None
        restore(checkpoint, self.model, self.optimizer, scaler=scaler, name=name)
        known = {key: checkpoint.get(key) for key in asdict(self.state)}
        self.state = TrainState(**{key: at for key, at in known.items() if at is not None})
        self._begin_next_epoch_if_done()

    def open_logger(self, run: RunFolder, progress: ProgressLine, resuming: bool) -> None:
        """Open the run's folder: a new one, or that of the run that goes on."""
        self.run_folder = run
        self.saved: Path | None = None  # the last checkpoint written
        resume_step = self.state.global_step if resuming else None
        self.logger = RunLogger(
            self.config,
            run,
            self.rank,
            self.world_size,
            self.device_choice.summary,
            progress,
            resume_step,
        )

    # ---- the loop -------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train, evaluating and saving on the way, until the last step or a request to stop."""
        self.logger.announce(self.model, self.amp_dtype, self.state.global_step, self.total_steps)
        stopped = False
        while self.state.global_step < self.total_steps and not stopped:
            stopped = self.train_epoch()
        return self._stopped() if stopped else self._finished()

    def train_epoch(self) -> bool:
        """Train to the end of the epoch in progress. Return whether a stop was asked for."""
        self.sampler.set_epoch(self.state.epoch)  # Horovod: every rank draws the same new order
        self.sampler.set_start(self.state.samples_seen)
        self.model.train()
        batches = iter(self.train_loader)
        while self._samples_left() > 0 and self.state.global_step < self.total_steps:
            if self.train_step(batches):
                return True
            self._evaluate_and_save_when_due()
            self._commit_when_due()
        self._begin_next_epoch_if_done()
        return False

    def train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> bool:
        """Take one optimizer step, all ranks together. Return whether any was asked to stop."""
        on_gpu = self.device.type == "cuda"
        timer = StepTimer(partial(torch.cuda.synchronize, self.device) if on_gpu else None)
        samples = min(self._global_batch(), self._samples_left())
        # What the step adds up over its backward passes and ranks: nats, tokens, requests to stop.
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for backward_pass in range(self.training.gradient_accumulation_steps):
            with timer.part("data"):
                batch = next(batches)
                tokens = count_predicted(batch)
                batch = {
                    name: value.to(self.device, non_blocking=True) for name, value in batch.items()
                }
            self._seed_random_draws(backward_pass)
            with timer.part("forward"), autocast(self.device, self.amp_dtype):
                _, loss = self.forward(**batch, return_logits=False)
            with timer.part("backward"):
                # Horovod: it takes the sum over the passes and the mean over the ranks. With each
                # loss weighted by its tokens, that is the mean over the batch of all ranks.
                weight = tokens * self.world_size / (samples * (self.config.model.max_seq_len - 1))
                self.scaler.scale(loss * weight).backward()
            sums[:2] += torch.stack([loss.detach().double() * tokens, loss.new_tensor(tokens)])
        sums[2] = float(self.stop.requested)
        # Horovod: started before the wait for the gradients, so that one wait is enough.
        reduction = distributed.start_reduce_sum(sums, "step_sums")
        with timer.part("allreduce"):
            distributed.synchronize(self.optimizer)  # Horovod: from here on gradients are means
            nats, tokens, stop_requests = distributed.finish_reduce_sum(reduction).tolist()
        with timer.part("update"):
            learning_rate, gradient_norm = self._update()
        self._advance(samples, int(tokens), nats / tokens)
        timer.stop()
        self.logger.step(
            self.state, self.total_steps, timer, int(tokens), learning_rate, gradient_norm
        )
        return stop_requests > 0

    def _update(self) -> tuple[float, float]:
        """Unscale, clip and apply the reduced gradients. Return the rate used and their norm."""
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scaler.unscale_(self.optimizer)
        limit = self.training.max_grad_norm or float("inf")
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        with distributed.already_synchronized(self.optimizer):  # Horovod: do not reduce them again
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return learning_rate, float(gradient_norm)

    def _seed_random_draws(self, backward_pass: int) -> None:
        """Make dropout a function of (seed, epoch, step, rank): a resumed run draws the same."""
        key = (self.config.seed, self.state.epoch, self.state.step, backward_pass, self.rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    # ---- the position in the data ---------------------------------------------------------------

    def _global_batch(self) -> int:
        """Return the blocks of one optimizer step, over all backward passes and ranks."""
        training = self.training
        return training.per_gpu_batch_size * training.gradient_accumulation_steps * self.world_size

    def _samples_left(self) -> int:
        return self.num_samples - self.state.samples_seen

    def _count_total_steps(self) -> int:
        """Return the step at which the run ends, counted from its start, at this world size."""
        left_in_epoch = -(-self._samples_left() // self._global_batch())
        epochs_after = self.training.num_epochs - self.state.epoch - 1
        left = left_in_epoch + epochs_after * -(-self.num_samples // self._global_batch())
        total = self.state.global_step + max(0, left)
        return min(total, self.training.max_steps or total)

    def _advance(self, samples: int, tokens: int, loss: float) -> None:
        state = self.state
        state.samples_seen += samples
        state.step += 1
        state.global_step += 1
        state.tokens += tokens
        state.loss = loss
        if state.global_step == 1:
            state.first_loss = loss

    def _begin_next_epoch_if_done(self) -> None:
        if self._samples_left() <= 0:
            next_epoch = self.state.epoch + 1
            self.state = replace(self.state, epoch=next_epoch, step=0, samples_seen=0)

    # ---- evaluation and checkpoints -------------------------------------------------------------

    def _evaluate_and_save_when_due(self) -> None:
        """Evaluate and save at their intervals, or where none is set, at the end of each epoch."""
        step, epoch_ends = self.state.global_step, self._samples_left() <= 0
        if is_due(step, self.training.eval_interval, epoch_ends) and step < self.total_steps:
            self.evaluate()
        if is_due(step, self.training.checkpoint_interval, epoch_ends):
            self.save(checkpoint_name(self.state.epoch, step))

    def evaluate(self) -> Evaluation:
        """Evaluate on the validation text, each rank on its part; save the best model so far."""
        own = evaluate(
            self.model,
            self.validation_loader,
            self.device,
            autocast(self.device, self.amp_dtype),
            self.training.eval_batches,
        )
        # Horovod: sums add up over ranks, means do not; and every rank comes here, never one alone.
        sums = torch.tensor([own.nats, own.tokens, own.correct], dtype=torch.float64)
        nats, tokens, correct = distributed.reduce_sum(sums, "evaluation").tolist()
        result = Evaluation(nats, int(tokens), int(correct))
        is_best = result.loss < self.state.best_loss
        if is_best:
            self.state.best_loss = result.loss
            self.save(BEST)
        self.logger.validation(self.state, result, is_best)
        return result

    def save(self, filename: str) -> None:
        """Write a checkpoint; rank 0 alone does, because all ranks hold the same."""
        if self.rank != 0:
            return
        folder = self.run_folder.checkpoint_dir
        self.saved = write_checkpoint(self.content(), folder / filename)
        remove_old_checkpoints(folder, self.training.keep_last_checkpoints)

    def content(self) -> dict[str, Any]:
        """Return what a checkpoint holds: all that is needed to go on, and to generate."""
        return checkpoint_content(
            self.model,
            self.optimizer,
            self.scheduler,
            self.scaler,
            config=self.config.to_dict(),
            tokenizer=self.tokenizer.to_json(),
            **asdict(self.state),
        )

    def _commit_when_due(self) -> None:
        """Commit, so that ranks may come and go: see `horovod_lm.training.elastic`."""
        due = is_due(
            self.state.global_step, self.training.commit_interval, self._samples_left() <= 0
        )
        if self.commits is not None and due:
            self.commits.commit()

    def _save_here(self, why: str) -> None:
        """Save where training stands, and say how to go on."""
        self.save(checkpoint_name(self.state.epoch, self.state.global_step))
        if self.saved is not None:
            self.logger.interrupted(why, self.state, self.saved)

    def another_rank_is_gone(self, error: Exception) -> LostRankError:
        """Save the last step that all ranks took, and return the error to raise."""
        self._save_here("another rank is gone; training ended")
        return LostRankError(
            f"rank {self.rank} lost another rank after step {self.state.global_step}"
            f" ({' '.join(str(error).split())})"
        )

    # ---- the end --------------------------------------------------------------------------------

    def _stopped(self) -> TrainingResult:
        self._save_here("stopped")
        return self._result(Evaluation(), stopped=True)

    def _finished(self) -> TrainingResult:
        evaluation = self.evaluate()
        self.save(FINAL)
        nats, entropy = self._score_stories()
        return self._result(evaluation, nats_per_story=nats, entropy_per_story=entropy)

    def _score_stories(self) -> tuple[float | None, float | None]:
        """Return nats per held-out story and their exact entropy; (None, None) for other text."""
        if self.config.data.source != "stories":
            return None, None
        from horovod_lm.data.synthetic.stories import generate_story, story_entropy

        first = self.config.data.num_stories  # those before it are the training and validation data
        own = range(
            first + self.rank, first + HELD_OUT_STORIES, self.world_size
        )  # Horovod: a share
        stories = [generate_story(self.config.seed, number) for number in own]
        nats = torch.tensor([sum(score_texts(self.model, self.tokenizer, stories, self.device))])
        total = distributed.reduce_sum(nats, "stories").item()  # Horovod: of all ranks' shares
        mean, entropy = total / HELD_OUT_STORIES, story_entropy()
        self.logger.stories(mean, entropy)
        return mean, entropy

    def _result(
        self, evaluation: Evaluation, stopped: bool = False, **stories: float | None
    ) -> TrainingResult:
        result = TrainingResult(
            run_name=self.run_folder.name,
            run_dir=self.run_folder.run_dir,
            steps=self.state.global_step,
            stopped=stopped,
            first_loss=self.state.first_loss,
            train_loss=self.state.loss,
            validation_loss=evaluation.loss,
            perplexity=evaluation.perplexity,
            tokens_per_second=self.logger.tokens_per_second,
            seconds=self.logger.seconds,
            checkpoint=self.saved,
            world_size=self.world_size,
            world_changes=self.state.world_changes,
            steps_replayed=self.state.steps_replayed,
            **stories,
        )
        return distributed.broadcast_object(result, name="result")  # Horovod: the same everywhere


def build_model(config: Config, eot_id: int | None = None) -> TransformerLM:
    """Return an untrained model of the configuration's shape; null pads with `eot_id`."""
    settings = config.model.model_dump()
    if settings["pad_token_id"] is None:
        settings["pad_token_id"] = eot_id
    return TransformerLM(**settings)


def prepare_data_once_per_host(config: Config, progress: ProgressLine) -> None:
    """Prepare the tokens on each host's first rank, while the host's other ranks wait.

    Raises:
        UserError: they cannot be prepared, or the hosts differ in what decides the outcome.
    """

    def show(phase: str, done: float) -> None:
        progress.update(f"preparing the data: {phase} {done:.0%}")

    # Horovod: two ranks of one host share its disk.
    distributed.local_rank_zero_first(lambda: prepare_data(config, progress=show))
    check_hosts_agree(config)


def count_predicted(batch: dict[str, torch.Tensor]) -> int:
    """Return how many tokens of a batch are predicted: the first of each block is only seen."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def is_due(step: int, interval: int | None, epoch_ends: bool) -> bool:
    """Return whether something that happens every `interval` steps, or every epoch, happens now."""
    return epoch_ends if interval is None else step % interval == 0


def on_rank_0(read: Callable[[], Any], name: str) -> Any:
    """Return what `read()` gives on rank 0 on every rank, and raise its error on every rank."""
    result = error = None
    if distributed.is_main_process():
        try:
            result = read()
        except CheckpointError as problem:
            error = problem
    # Horovod: a rank 0 that raised alone would leave the others waiting for its broadcast.
    result, error = distributed.broadcast_object((result, error), name=name)
    if error is not None:
        raise error
    return result
