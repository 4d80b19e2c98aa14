"""Writers are killed, files are damaged: what was saved can still be read."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from horovod_lm.training.checkpoint import find_checkpoints, read_checkpoint, remove_old_checkpoints
from horovod_lm.utils.distributed import map_tensors
from horovod_lm.utils.errors import CheckpointError
from tests.conftest import FULL
from tests.training.test_resume import assert_same_run

KILLS = 200 if FULL else 25
FLIPPED_BITS = 5000 if FULL else 500
RUN = ("--config", "configs/tiny.yaml", "--set", "training.max_steps=60", "--set",
       "training.num_epochs=9", "--set", "training.keep_last_checkpoints=99")  # fmt: skip

# Each child saves until it is killed, at any moment of a save. Prints how many kills left a part of
# a file. One import of torch is enough: the children are forks.
KILL_WRITERS = """
import os, random, signal, sys, time
import torch
from horovod_lm.training.checkpoint import read_checkpoint, save_checkpoint
folder, kills = sys.argv[1], int(sys.argv[2])
model, incomplete = torch.nn.Linear(1000, 500), 0
def save(step):
    with torch.no_grad():
        model.weight.fill_(step)
    return save_checkpoint(model, None, 0, step, float(step), folder, "final_model.pt")
started = time.monotonic()
path = save(0)
seconds = time.monotonic() - started
random.seed(0)
for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(10**6):
            save(step)
            os.write(writer, b".")
    os.read(reader, 1)
    time.sleep(2 * seconds * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    incomplete += os.path.exists(f"{folder}/.final_model.pt.{child}.tmp")
    checkpoint = read_checkpoint(path)
    assert (checkpoint["model"]["weight"] == checkpoint["step"]).all()
print(incomplete)
"""


def test_a_writer_killed_at_any_moment_leaves_a_complete_file(tmp_path, note_fault):
    command = [sys.executable, "-c", KILL_WRITERS, str(tmp_path), str(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    incomplete = int(done.stdout)
    assert incomplete > KILLS / 4
    # Temporary files of killed writers are hidden, and deleted with the next checkpoint.
    [saved] = find_checkpoints(tmp_path)
    remove_old_checkpoints(tmp_path, keep=3)
    assert [*tmp_path.iterdir()] == [saved]
    note_fault(None, f"{KILLS} kills, {incomplete} of them during a save: 0 checkpoints unreadable")


@pytest.fixture(scope="module")
def whole(tiny_project, start_for_module) -> Path:
    """A run of one process with enough space."""
    finished = start_for_module(["-m", "horovod_lm.train", *RUN, "--run-name", "whole"]).wait(90)
    assert finished.code == 0, finished.output[-4000:]
    return tiny_project / "runs" / "whole"


def bits_of(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with the bytes of each tensor in its place."""
    return map_tensors(read_checkpoint(path), lambda part: (part.dtype, part.numpy().tobytes()))


def test_no_flipped_bit_changes_what_is_read(whole, tmp_path, note_fault):
    content = (whole / "checkpoints" / "final_model.pt").read_bytes()
    path, refused = tmp_path / "flipped.pt", 0
    path.write_bytes(content)
    saved = bits_of(path)
    for bit in random.Random(0).sample(range(8 * len(content)), FLIPPED_BITS):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert bits_of(path) == saved, bit
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    note_fault(None, f"{FLIPPED_BITS} single bits: {refused} refused, the others change no value")


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_newest_checkpoint_is_passed_over(whole, train, damage, note_fault):
    folder = shutil.copytree(whole, whole.with_name(damage))
    (folder / "checkpoints" / "final_model.pt").unlink()
    newest, earlier = find_checkpoints(folder / "checkpoints")[:2]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content[: len(content) // 2] if damage == "torn" else content)
    resumed = train("--resume", str(folder))
    assert f"{newest} is damaged or truncated" in resumed.output
    assert f"resuming at step {read_checkpoint(earlier)['global_step']} of 60" in resumed.output
    assert_same_run(whole, folder)
    note_fault(None, "newest checkpoint passed over", resumed="bit for bit from the one before")
