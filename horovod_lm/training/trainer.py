"""The training loop, for one process or many Horovod ranks.

    horovodrun -np 2 python -m horovod_lm.train --config configs/tiny.yaml
    python -m horovod_lm.train --config configs/tiny.yaml        # the same loop in one process

Every line that exists only because training is distributed carries the tag `# Horovod:`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from horovod_lm.data import get_dataloaders, load_tokenizer, prepare_data
from horovod_lm.data.prepare import read_metadata
from horovod_lm.data.split import TRAIN, VAL
from horovod_lm.models.loss import IGNORE_INDEX
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.training.checkpoint import (
    BEST,
    FINAL,
    CheckpointWriter,
    check_same_data,
    check_same_model,
    checkpoint_content,
    checkpoint_name,
    checkpoint_step,
    find_checkpoints,
    read_checkpoint,
    restore,
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
    step_if_finite,
)
from horovod_lm.training.run_dir import RunFolder, default_run_name
from horovod_lm.training.run_logger import RunLogger, TrainingResult, TrainState
from horovod_lm.utils import distributed
from horovod_lm.utils.config import Config
from horovod_lm.utils.distributed import DeviceChoice
from horovod_lm.utils.errors import CheckpointError, ConfigError, DivergenceError, LostRankError
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
    """Train a model; every rank calls this with the same arguments.

    Prepares the data first if necessary. An earlier run of the same name is renamed unless it is
    resumed. Ctrl-C stops every rank after the current step and saves a checkpoint.

    Args:
        config: the configuration; `configs/config.yaml` explains every key.
        rank, world_size, local_rank: from `setup_horovod`; `local_rank` selects the GPU.
        resume_checkpoint: the checkpoint to resume from, at any world size, or a folder with
            checkpoints. Only rank 0 reads it.
        run_name: name of the run's folder under `runs/`; None: a new name with the time in it.

    Returns:
        The results of the run, the same on every rank.

    Raises:
        UserError: an error in a setting, the data or the checkpoint; another process trains this
            run.
        DivergenceError: the loss or a gradient is not finite.
        LostRankError: another rank was lost; rank 0, if it remains, has saved a checkpoint.
    """
    # Horovod: each rank would choose a name of its own.
    run_name = distributed.broadcast_object(run_name or default_run_name(), name="run_name")
    # Horovod: a collective call: the ranks agree on how gradients are reduced.
    device = distributed.agree_on_devices(config.training.device, local_rank)
    progress = ProgressLine(enabled=rank == 0)
    resume = None if resume_checkpoint is None else read_on_rank_0(resume_checkpoint)
    prepare_data_once_per_host(config, progress, resume)
    # Horovod: horovodrun is slow to kill a hung rank, and cannot on another host.
    with StopRequest() as stop, distributed.hang_watchdog(stop):
        run = RunFolder.of(config, run_name)
        trainer = Trainer(
            config, run, rank, world_size, device, progress, stop, resume, resume_checkpoint
        )  # fmt: skip
        try:
            return trainer.run()
        except Exception as error:
            if distributed.is_lost_rank_error(error):
                raise trainer.save_after_lost_rank(error) from error
            raise
        finally:
            trainer.close()


class Trainer:
    """Trains one rank's replica of the model.

    `resume` is the content of the checkpoint to resume from, the same on every rank, and `name`
    its name in messages. Elastic training calls `commit` every `training.commit_interval` steps.
    """

    def __init__(
        self,
        config: Config,
        run_folder: RunFolder,
        rank: int,
        world_size: int,
        device: DeviceChoice,
        progress: ProgressLine,
        stop: StopRequest,
        resume: Mapping[str, Any] | None = None,
        name: str | Path | None = None,
        commit: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.training = config, config.training
        self.run_folder, self.stop, self.commit = run_folder, stop, commit
        self.rank, self.world_size = rank, world_size
        self.device = device.device
        self.writer = CheckpointWriter()
        stop.saving = self.writer.is_busy
        self.last_checkpoint: Path | None = None  # of this session
        self._can_remove = False  # whether older checkpoints can be deleted
        self._unread: tuple[Any, ...] | None = None  # numbers of the last step, on its device
        self._build(device.staged, resume)
        self._load(resume, name)
        resume_step = None if resume is None else self.state.global_step
        self.logger = RunLogger(
            self.config, run_folder, rank, world_size, device.summary, progress, resume_step
        )

    def _build(self, staged: bool, resume: Mapping[str, Any] | None) -> None:
        """Build data, model and optimizer; a run that is resumed keeps its `amp_dtype`."""
        config = self.config
        data_dir = config.resolve(config.data.data_dir)
        self.data = data_hashes(data_dir)
        # Horovod: each rank reads its own part of every batch.
        self.train_loader, self.validation_loader = get_dataloaders(
            config, self.rank, self.world_size
        )
        self.sampler = self.train_loader.batch_sampler
        self.num_samples = len(self.train_loader.dataset)
        self.tokenizer = load_tokenizer(data_dir / "tokenizer.json")
        self.tokenizer_json = self.tokenizer.to_json()
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.tokenizer.eot_id)
        self.model.to(self.device, getattr(torch, config.training.dtype))
        saved = (resume or {}).get("config")
        # Horovod: all ranks take what rank 0 measures.
        self.amp_dtype = distributed.on_rank_0(
            lambda: choose_amp_dtype(config.training, self.model, saved), "amp_dtype"
        )
        if self.amp_dtype != torch.float64:  # noted for the run's config.yaml and checkpoints
            name = str(self.amp_dtype).removeprefix("torch.")
            self.config = config.with_overrides({"training.amp_dtype": name})
        if self.device.type == "cuda" and self.amp_dtype.itemsize < 4:
            torch.set_float32_matmul_precision("high")  # TF32 for the products outside of autocast
        # Horovod: wrapping comes before loading, because it discards the optimizer's state.
        self.optimizer = distributed.distributed_optimizer(
            build_optimizer(self.model, config.training),
            self.model.named_parameters(),
            config.training.gradient_accumulation_steps,
            config.distributed,
            staged,
        )
        self.scaler = build_scaler(self.device, self.amp_dtype)
        if config.training.compile:
            check_can_compile(self.device)
            # Horovod: a layer's gradients are reduced while the layers below are computed.
            self.model.compile_layers()

    def _load(self, resume: Mapping[str, Any] | None, name: str | Path | None) -> None:
        """Restore the state to resume from, give it to every rank, and build the schedule."""
        self.state = TrainState()
        if resume is not None:
            name = name or "the last commit"
            check_same_model(resume, self.config, name)
            check_same_data(resume, self.tokenizer_json, self.data, name)
            scaler = self.scaler if self.scaler.is_enabled() else None
            restore(resume, self.model, self.optimizer, scaler=scaler, name=name)
            saved = {key: resume.get(key) for key in asdict(self.state)}
            self.state = TrainState(**{key: v for key, v in saved.items() if v is not None})
            self._begin_next_epoch_if_done()
        # Horovod: parameters last, so that every rank starts from the same bits.
        distributed.broadcast_parameters(self.model)
        self.total_steps = self._count_total_steps()
        self.scheduler = build_scheduler(
            self.optimizer, self.training, self.total_steps, self.world_size, self.state.global_step
        )

    # ---- the loop -------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train to the last step or to a stop request, with evaluations and checkpoints."""
        self.logger.announce(self.model, self.amp_dtype, self.state.global_step, self.total_steps)
        stopped = False
        while self.state.global_step < self.total_steps and not stopped:
            stopped = self.train_epoch()
        if stopped:
            self._save_and_explain("stopped")
            return self._result(Evaluation(), stopped=True)
        evaluation = self.evaluate()
        self.save(FINAL)
        self._remove_old_checkpoints()
        self.writer.wait()
        if self.config.data.source == "stories":
            self._score_stories()
        return self._result(evaluation)

    def train_epoch(self) -> bool:
        """Train to the end of the current epoch. Return whether a rank was asked to stop."""
        self.sampler.set_epoch(self.state.epoch)  # Horovod: every rank draws the same new order
        self.sampler.set_start(self.state.samples_seen)
        self.model.train()
        batches = iter(self.train_loader)
        while self._samples_left() > 0 and self.state.global_step < self.total_steps:
            if self.train_step(batches):
                return True
            self._evaluate_save_and_commit_when_due()
        self._read_last_step()
        self._begin_next_epoch_if_done()
        return False

    def train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> bool:
        """Take one optimizer step on all ranks. Return whether a rank was asked to stop.

        A GPU works asynchronously. To keep it busy, nothing here waits for it, except that several
        ranks wait for their gradients: the next batch is copied while the GPU still computes, and
        the numbers of a step are read when the next one is under way.
        """
        timer = StepTimer(self.device)
        samples = min(self.sampler.samples_per_step, self._samples_left())
        # Over all backward passes and ranks: loss in nats, predicted tokens, stop requests.
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for backward_pass in range(self.training.gradient_accumulation_steps):
            with timer.part("data"):
                batch = next(batches)
                tokens = count_predicted(batch)
                batch = {
                    key: part.to(self.device, non_blocking=True) for key, part in batch.items()
                }
            self._seed_dropout(backward_pass)
            with timer.part("forward"), autocast(self.device, self.amp_dtype):
                _, loss = self.model(**batch, return_logits=False)
            with timer.part("backward"):
                # Horovod: sums gradients over the passes and averages them over the ranks. With
                # this weight, the result is the gradient of the mean loss of the global batch.
                weight = tokens * self.world_size / (samples * (self.config.model.max_seq_len - 1))
                self.scaler.scale(loss * weight).backward()
            sums[0].add_(loss.detach().double() * tokens)
            sums[1].add_(tokens)
        sums[2].fill_(self.stop.requested)  # an assignment would copy the number, and wait
        # Horovod: starts before the wait for the gradients, so that the ranks wait only once.
        reduction = distributed.start_reduce_sum(sums, "step_sums")
        with timer.part("allreduce"):
            distributed.synchronize(self.optimizer)  # Horovod: now gradients are averages
            sums = distributed.finish_reduce_sum(reduction)
        self._read_last_step()
        with timer.part("update"):
            learning_rate, gradient_norm = self._update()
        self.state.samples_seen += samples
        self.state.step += 1
        self.state.global_step += 1
        numbers = [part.to("cpu", non_blocking=True) for part in (sums, gradient_norm)]
        timer.stop()
        self._unread = (*numbers, learning_rate, timer)
        # Horovod: with several ranks, the sums are in CPU memory.
        return self.stop.requested if self.world_size == 1 else sums[2].item() > 0

    def _update(self) -> tuple[float, torch.Tensor]:
        """Unscale, clip and apply the averaged gradients. Return learning rate and norm."""
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scaler.unscale_(self.optimizer)
        limit = self.training.max_grad_norm or float("inf")
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        with distributed.already_synchronized(self.optimizer):  # Horovod: do not reduce them again
            step_if_finite(self.optimizer, self.scaler, gradient_norm)
        self.optimizer.zero_grad()
        self.scheduler.step()
        return learning_rate, gradient_norm

    def _read_last_step(self) -> None:
        """Read, check and record the numbers of the last step, if this has not been done.

        Raises:
            DivergenceError: on every rank, if the step's loss or gradient norm is not finite. The
                step has not changed the parameters.
        """
        if self._unread is None:
            return
        (sums, gradient_norm, learning_rate, timer), self._unread = self._unread, None
        seconds, parts = timer.wait()
        nats, tokens, _ = sums.tolist()
        loss, norm = nats / tokens, gradient_norm.item()
        self._check_finite("loss", loss)
        # A scaler leaves out a step with infinite gradients, and halves its scale.
        is_scaled = not math.isfinite(norm) and self.scaler.is_enabled()
        if not is_scaled or self.scaler.get_scale() < 1:
            self._check_finite("gradient norm", norm)
        self._remove_old_checkpoints()
        state = self.state
        state.tokens += int(tokens)
        state.loss = loss
        if state.global_step == 1:
            state.first_loss = loss
        self.logger.step(state, self.total_steps, seconds, parts, int(tokens), learning_rate, norm)

    def _check_finite(self, what: str, value: float) -> None:
        """Raise DivergenceError if `value` is not finite; it is the same on every rank."""
        if math.isfinite(value):
            return
        step = self.state.global_step
        find = partial(self._last_good_checkpoint, before=step - (what != "validation loss"))
        # Horovod: only rank 0's disk has to hold checkpoints.
        good = distributed.on_rank_0(find, "last_good_checkpoint")
        raise DivergenceError(
            f"the {what} is {value} at step {step}, so training ended without saving this model:"
            f" use a smaller training.learning_rate ({self.training.learning_rate:g}) or"
            f" training.max_grad_norm ({self.training.max_grad_norm or 'none'}); {good}"
        )

    def _last_good_checkpoint(self, before: int) -> str:
        """Say which checkpoint to resume from: its parameters have given a later finite loss."""
        self.writer.wait()
        folder = self.run_folder.checkpoint_dir
        numbered = [path for path in find_checkpoints(folder) if path.name != FINAL]
        good = [path for path in numbered if checkpoint_step(path) < before]
        good += [folder / BEST] * (folder / BEST).is_file()
        if not good:
            return "there is no good checkpoint: start the run again"
        return f"the last good checkpoint is {good[0].name}; {self.logger.how_to_resume(good[0])}"

    def _seed_dropout(self, backward_pass: int) -> None:
        """Make dropout a function of seed, epoch, step and rank: a resumed run repeats it."""
        key = (self.config.seed, self.state.epoch, self.state.step, backward_pass, self.rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    # ---- the position in the data ---------------------------------------------------------------

    def _samples_left(self) -> int:
        return self.num_samples - self.state.samples_seen

    def _count_total_steps(self) -> int:
        """Return the last step of the run, counted from its start, at this world size."""
        left_in_epoch = -(-self._samples_left() // self.sampler.samples_per_step)
        epochs_after = self.training.num_epochs - self.state.epoch - 1
        left = left_in_epoch + epochs_after * -(-self.num_samples // self.sampler.samples_per_step)
        total = self.state.global_step + max(0, left)
        return min(total, self.training.max_steps or total)

    def _begin_next_epoch_if_done(self) -> None:
        if self._samples_left() <= 0:
            next_epoch = self.state.epoch + 1
            self.state = replace(self.state, epoch=next_epoch, step=0, samples_seen=0)

    # ---- evaluation and checkpoints -------------------------------------------------------------

    def _evaluate_save_and_commit_when_due(self) -> None:
        step = self.state.global_step
        if self._is_due(self.training.eval_interval) and step < self.total_steps:
            self.evaluate()
        if self._is_due(self.training.checkpoint_interval):
            self.save(checkpoint_name(self.state.epoch, step))
        if self.commit is not None and self._is_due(self.training.commit_interval):
            self._read_last_step()
            self.commit()

    def _is_due(self, interval: int | None) -> bool:
        """Return whether this step ends an interval; None: an epoch."""
        if interval is None:
            return self._samples_left() <= 0
        return self.state.global_step % interval == 0

    def evaluate(self) -> Evaluation:
        """Evaluate on the validation data, each rank on its part, and save the best model."""
        self._read_last_step()
        own = evaluate(
            self.model,
            self.validation_loader,
            self.device,
            autocast(self.device, self.amp_dtype),
            self.training.eval_batches,
        )
        # Horovod: a collective call, so every rank evaluates; sums can be added, means cannot.
        sums = torch.tensor([own.nats, own.tokens, own.correct], dtype=torch.float64)
        nats, tokens, correct = distributed.reduce_sum(sums, "evaluation").tolist()
        result = Evaluation(nats, int(tokens), int(correct))
        if tokens:
            self._check_finite("validation loss", result.loss)
        is_best = result.loss < self.state.best_loss
        if is_best:
            self.state.best_loss = result.loss
            self.save(BEST)
        self.logger.validation(self.state, result, is_best)
        return result

    def save(self, filename: str) -> None:
        """Begin to write a checkpoint; only rank 0 does, because all ranks have the same state."""
        self._read_last_step()
        if self.rank != 0:
            return
        self.last_checkpoint = self.run_folder.checkpoint_dir / filename
        self.writer.write(self.content(), self.last_checkpoint)
        self._can_remove = True

    def _remove_old_checkpoints(self) -> None:
        """Delete old checkpoints, now that the parameters in the newest gave finite numbers."""
        if self._can_remove:
            folder = self.run_folder.checkpoint_dir
            self.writer.remove_old(folder, self.training.keep_last_checkpoints)
            self._can_remove = False

    def content(self) -> dict[str, Any]:
        """Return the content of a checkpoint: all that resuming and generation need."""
        config = self.config.to_dict()
        # Environment variables may hold secrets, and checkpoints are passed on.
        for section in (config["distributed"], *config["distributed"]["hosts"]):
            section["environment"] = {}
        return checkpoint_content(
            self.model,
            self.optimizer,
            self.scheduler,
            self.scaler,
            config=config,
            tokenizer=self.tokenizer_json,
            data=self.data,
            **asdict(self.state),
        )

    def _save_and_explain(self, why: str) -> None:
        """Save a checkpoint, and print how to resume."""
        self.save(checkpoint_name(self.state.epoch, self.state.global_step))
        self.writer.wait()
        if self.last_checkpoint is not None:
            self.logger.interrupted(why, self.state, self.last_checkpoint)

    def save_after_lost_rank(self, error: Exception) -> LostRankError:
        """Save the last step that all ranks took, and return the error to raise."""
        self._save_and_explain("another rank was lost; training ended")
        return LostRankError(
            f"rank {self.rank} lost another rank after step {self.state.global_step}"
            f" ({' '.join(str(error).split())})"
        )

    def close(self) -> None:
        """Wait for a checkpoint that is being written, and close the logs; also after an error."""
        try:
            self.writer.wait()
        except CheckpointError as error:  # another error has ended the run
            print(f"warning: {error}", file=sys.stderr)
        finally:
            self.logger.close()

    def _score_stories(self) -> None:
        """Record nats per held-out story beside their exact entropy."""
        from horovod_lm.data.synthetic.stories import generate_story, story_entropy

        first = self.config.data.num_stories  # earlier stories are training and validation data
        # Horovod: each rank scores every `world_size`-th story.
        own = range(first + self.rank, first + HELD_OUT_STORIES, self.world_size)
        stories = [generate_story(self.config.seed, number) for number in own]
        nats = torch.tensor([sum(score_texts(self.model, self.tokenizer, stories, self.device))])
        total = distributed.reduce_sum(nats, "stories").item()  # Horovod: over all ranks
        self.logger.stories(total / HELD_OUT_STORIES, story_entropy())

    def _result(self, evaluation: Evaluation, stopped: bool = False) -> TrainingResult:
        result = TrainingResult(
            run_dir=self.run_folder.run_dir,
            steps=self.state.global_step,
            stopped=stopped,
            first_loss=self.state.first_loss,
            train_loss=self.state.loss,
            validation_loss=evaluation.loss,
            perplexity=evaluation.perplexity,
            tokens_per_second=self.logger.tokens_per_second,
            seconds=self.logger.seconds,
            checkpoint=self.last_checkpoint,
        )
        return distributed.broadcast_object(result, name="result")  # Horovod: the same everywhere


def build_model(config: Config, eot_id: int | None = None) -> TransformerLM:
    """Return an untrained model; `pad_token_id: null` in the configuration means `eot_id`.

    Raises:
        ConfigError: the model does not fit into memory.
    """
    settings = config.model.model_dump()
    if settings["pad_token_id"] is None:
        settings["pad_token_id"] = eot_id
    try:
        return TransformerLM(**settings)
    except (RuntimeError, TypeError) as error:  # torch's allocator; sizes beyond 64 bits
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "the model does not fit into memory: use smaller sizes in the section model of the"
            f" configuration ({reason})"
        ) from error


def check_can_compile(device: torch.device) -> None:
    """Raise ConfigError where torch's linker commands for the CPU do not quote its folder."""
    folder = str(Path(torch.__file__).parent)
    if device.type == "cpu" and " " in folder:
        raise ConfigError(
            f"training.compile cannot work on the CPU here: torch is in {folder} and does not quote"
            " the space in that path; move the project, or set training.compile=false"
        )


def prepare_data_once_per_host(
    config: Config, progress: ProgressLine, resume: Mapping[str, Any] | None = None
) -> None:
    """Prepare the tokens on each host's first rank, while the host's other ranks wait.

    A run that is resumed keeps the tokens that it began with, whatever became of its text. Raises
    a UserError if the data cannot be prepared, or the hosts differ in code or data.
    """

    def show(phase: str, done: float) -> None:
        progress.update(f"preparing the data: {phase} {done:.0%}")

    def prepare() -> None:
        known = resume and resume.get("data")
        if not known or data_hashes(config.resolve(config.data.data_dir)) != known:
            prepare_data(config, progress=show)

    # Horovod: the ranks of a host share its disk.
    distributed.local_rank_zero_first(prepare)
    check_hosts_agree(config)


def count_predicted(batch: Mapping[str, torch.Tensor]) -> int:
    """Return the number of predicted tokens in a batch: all but the first of each block."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def data_hashes(data_dir: Path) -> dict[str, str]:
    """Return a hash of the training and of the validation tokens; empty if there are none."""
    metadata = read_metadata(data_dir) or {}
    return {
        name: metadata[part]["sha256"]
        for part, name in ((TRAIN, "training tokens"), (VAL, "validation tokens"))
        if part in metadata
    }


def read_on_rank_0(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on rank 0, and return its content, or raise its error, on every rank."""
    # Horovod: only rank 0's disk has to hold the checkpoint; the others receive it.
    return distributed.on_rank_0(lambda: read_checkpoint(path), "checkpoint")
