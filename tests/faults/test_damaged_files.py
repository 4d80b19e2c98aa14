"""Writers are killed, the disk is full, files are damaged: what was saved can still be read."""

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
from tests.conftest import FULL, ROOT
from tests.training.test_resume import assert_same_run

KILLS = 200 if FULL else 25
FLIPPED_BITS = 5000 if FULL else 500
RUN = ("--config", "configs/tiny.yaml", "--set", "training.max_steps=60", "--set",
       "training.num_epochs=9", "--set", "training.keep_last_checkpoints=99")  # fmt: skip

# Each child saves, and changes the model meanwhile, until it is killed at a random moment, until so
# many were killed during a save, which leaves a part of a file. Prints the number of all kills. One
# import of torch is enough: the children are forks.
KILL_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from horovod_lm.training.checkpoint import CheckpointWriter, checkpoint_content, read_checkpoint
folder, wanted = sys.argv[1], int(sys.argv[2])
path = Path(folder, "final_model.pt")
model, kills, incomplete = torch.nn.Linear(1000, 500), 0, 0
def train_and_save(step, writer):
    with torch.no_grad():
        model.weight.fill_(step)
    writer.write(checkpoint_content(model, step=step), path)
started = time.monotonic()
first = CheckpointWriter()
train_and_save(0, first)
first.wait()
seconds = time.monotonic() - started
random.seed(0)
while incomplete < wanted and kills < 10 * wanted:
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        writer = CheckpointWriter()
        for step in range(10**6):
            train_and_save(step, writer)
            os.write(begins, b".")
    os.read(begun, 1)
    time.sleep(2 * seconds * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun), os.close(begins)
    kills += 1
    incomplete += os.path.exists(f"{folder}/.final_model.pt.{child}.tmp")
    checkpoint = read_checkpoint(path)
    assert (checkpoint["model"]["weight"] == checkpoint["step"]).all()
print(kills, incomplete)
"""


def test_a_writer_killed_at_any_moment_leaves_a_complete_file(tmp_path, note_fault):
    command = [sys.executable, "-c", KILL_WRITERS, str(tmp_path), str(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, incomplete = map(int, done.stdout.split())
    assert incomplete == KILLS
    # Temporary files of killed writers are hidden, and deleted with the next checkpoint.
    [saved] = find_checkpoints(tmp_path)
    remove_old_checkpoints(tmp_path, keep=3)
    assert [*tmp_path.iterdir()] == [saved]
    note_fault(None, f"{kills} kills, {incomplete} of them during a save: 0 checkpoints unreadable")


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


@pytest.mark.parametrize("damage", ["torn", "flipped"] if FULL else ["flipped"])
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


# A small disk is mounted for the command alone, and its files are kept.
ON_A_SMALL_DISK = """
disk=$1 size=$2; shift 2
mkdir -p "$disk" && mount -t tmpfs -o "size=$size" tmpfs "$disk" || exit 99
"$@"; code=$?
cp -r "$disk" "$disk.kept"
exit $code
"""
IN_A_NAMESPACE = ("unshare", "--map-root-user", "--mount")
needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        [*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True
    ).returncode,
    reason="no disk can be mounted here: unshare --map-root-user --mount fails",
)


@pytest.fixture
def on_a_small_disk(tiny_project):
    """Train with some folders on a disk of a few KiB; return what is said of it, and the disk."""

    def run(name: str, kib: int, *settings: str, code: int) -> tuple[list[str], Path]:
        disk = tiny_project / f"disk of {name}"
        command = [*IN_A_NAMESPACE, "sh", "-c", ON_A_SMALL_DISK, "sh", str(disk), f"{kib}k",
                   sys.executable, "-m", "horovod_lm.train", *RUN, "--run-name", name]  # fmt: skip
        for setting in settings:
            command += ["--set", f"{setting}={disk}"]
        done = subprocess.run(
            command, cwd=tiny_project, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=90,
        )  # fmt: skip
        assert done.returncode == code and "Traceback" not in done.stdout, done.stdout
        return [line for line in done.stdout.splitlines() if "No space left" in line], disk

    return run


@needs_namespaces
def test_training_goes_on_when_the_disk_of_its_records_is_full(whole, on_a_small_disk, note_fault):
    records = ("paths.run_dir", "paths.log_dir", "paths.tensorboard_dir")
    said, _ = on_a_small_disk("full-records", 24, *records, code=0)
    assert 1 <= len(said) <= len(records)  # once
    one, two = (
        bits_of(run / "checkpoints" / "final_model.pt")
        for run in (whole, whole.with_name("full-records"))
    )
    assert (one["model"], one["optimizer"]) == (two["model"], two["optimizer"])
    note_fault(None, said[0], resumed="not ended, same bits")


REFUSALS = {"config": (4, "paths.run_dir"), "tokens": (4, "data.data_dir")}


@needs_namespaces
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_full_disk_before_the_first_step_is_one_sentence(on_a_small_disk, note_fault, kind):
    [sentence], disk = on_a_small_disk(f"full-{kind}", *REFUSALS[kind], code=2)
    assert sentence.startswith("error: ") and str(disk) in sentence
    note_fault(None, sentence)


@needs_namespaces
def test_a_checkpoint_on_a_full_disk_ends_the_run_and_it_resumes_from_the_one_before(
    whole, on_a_small_disk, train, note_fault
):
    [sentence], disk = on_a_small_disk("full-checkpoint", 700, "paths.checkpoint_dir", code=2)
    assert sentence.startswith(f"error: the checkpoint {disk}")
    kept = disk.with_name(f"{disk.name}.kept")
    assert not [*kept.glob("*.tmp")] and find_checkpoints(kept)
    disk.rmdir()
    kept.rename(disk)  # there is space now
    folder = whole.with_name("full-checkpoint")
    resumed = train("--resume", str(folder))
    assert "resuming at step " in resumed.output
    (folder / "checkpoints").symlink_to(disk)
    assert_same_run(whole, folder)
    note_fault(None, sentence, resumed="bit for bit")
