"""Run by horovodrun: train elastically, and record the samples and the state of each step.

SIGUSR1 raises an exception in this rank. Steps are slow until the test makes the file `hurry` in
the run's folder, so that there is time for ranks to join.
"""

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import replace

from horovod_lm.data.loaders import TokenBlockDataset
from horovod_lm.train import main
from horovod_lm.training import elastic
from horovod_lm.training.trainer import Trainer
from horovod_lm.utils import distributed

SECONDS_PER_STEP = 0.2
seen: list[tuple[int, int]] = []  # (which dataset, which sample)
take_sample = TokenBlockDataset.__getitem__


def take_and_note(dataset, index):
    seen.append((id(dataset), int(index)))
    return take_sample(dataset, index)


agree_on_devices = distributed.agree_on_devices


def agree_and_stage(*arguments):
    return replace(agree_on_devices(*arguments), staged=True)


def fail(*_: object) -> None:
    raise RuntimeError("this rank was told to fail")


def fingerprint(trainer: Trainer) -> str:
    """Return a hash of every bit of parameters, moments, step counts and rates."""
    content, digest = trainer.content(), hashlib.sha256()
    for part in ("model", "optimizer", "scheduler", "scaler"):
        distributed.map_tensors(
            content[part], lambda tensor: digest.update(tensor.detach().numpy().tobytes())
        )
    digest.update(str(trainer.scheduler.state_dict()["_last_lr"]).encode())
    return digest.hexdigest()


class WitnessedTrainer(Trainer):
    """A trainer whose every step leaves a line in `witness-PID.jsonl`."""

    def train_step(self, batches):
        folder, epoch = self.run_folder.run_dir, self.state.epoch
        if not (folder / "hurry").exists():
            time.sleep(SECONDS_PER_STEP)
        seen.clear()
        stopped = super().train_step(batches)
        line = {
            "world": self.state.world_changes,
            "rank": self.rank,
            "ranks": self.world_size,
            "epoch": epoch,
            "step": self.state.global_step,
            "samples": [index for owner, index in seen if owner == id(self.train_loader.dataset)],
            "fingerprint": fingerprint(self),
        }
        with open(folder / f"witness-{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        return stopped


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, fail)
    TokenBlockDataset.__getitem__ = take_and_note
    elastic.Trainer = WitnessedTrainer
    if os.environ["STAGE_GRADIENTS"]:
        distributed.agree_on_devices = agree_and_stage
    time.sleep(float(os.environ.get("SECONDS_BEFORE_HOROVOD", 0)))
    sys.exit(main(sys.argv[1:]))
