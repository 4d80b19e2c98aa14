"""The functions around Horovod: on two real ranks, before init, and without Horovod."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from horovod_lm.utils import distributed
from horovod_lm.utils.cli import command
from horovod_lm.utils.config import DistributedConfig
from horovod_lm.utils.errors import ConfigError
from tests.conftest import ROOT

NOT_INSTALLED = "raise ModuleNotFoundError(\"No module named 'horovod'\", name='horovod')"
FOR_ANOTHER_TORCH = "raise OSError('mpi_lib_v2.so: undefined symbol: _ZN3c10\\nand a second line')"


@pytest.fixture
def run_python(tmp_path):
    """Run Python code in a fresh process, with a `horovod` of our choosing."""

    def run(code: str, horovod: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT)]
        if horovod is not None:
            (tmp_path / "horovod").mkdir()
            (tmp_path / "horovod" / "__init__.py").write_text(horovod)
            paths.insert(0, str(tmp_path))
        clean = {name: value for name, value in os.environ.items() if "HOROVOD_" not in name}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
            env=clean | {"PYTHONPATH": os.pathsep.join(paths)} | env,
        )  # fmt: skip

    return run


def test_every_helper_works_before_init(capsys):
    # Fault 4: Horovod before init raises ValueError, not ImportError.
    pytest.importorskip("horovod.torch")
    d, done = distributed, []
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert d.distributed_optimizer(optimizer, model.named_parameters(), 4) is optimizer
    model.weight.sum().backward()
    d.synchronize(optimizer)
    with d.already_synchronized(optimizer):
        pass
    assert model.weight.grad.item() == 1
    d.local_rank_zero_first(lambda: done.append(1))
    d.broadcast_parameters(model)
    d.shutdown()
    value = torch.tensor([1.5, 2.0], requires_grad=True)
    assert d.reduce_sum(value, "a").tolist() == [1.5, 2.0]
    assert d.finish_reduce_sum(d.start_reduce_sum(value, "b")).tolist() == [1.5, 2.0]
    assert d.get_rank() == d.get_local_rank() == 0 and d.is_main_process()
    assert d.get_world_size() == d.get_local_size() == 1 and done == [1]
    assert d.metric_average(2.5, name="c") == d.metric_average(torch.tensor(2.5), "d") == 2.5
    assert d.broadcast_object([1], "e") == [1] and d.gather_objects("x", "f") == ["x"]
    assert d.setup_horovod(require_distributed=False)[:3] == (1, 0, 0)
    assert not d.is_distributed() and capsys.readouterr().err == ""


ALONE = "note: Horovod is not installed: training alone, in one process"
DOES_NOT_LOAD = (
    "note: Horovod is installed but does not load (mpi_lib_v2.so: undefined symbol: _ZN3c10):"
    " run python -m horovod_lm.setup.install_horovod"
)
NEEDED = (
    f"error: Horovod is not installed for torch {torch.__version__}:"
    " run python -m horovod_lm.setup.install_horovod"
)


@pytest.mark.parametrize(
    ("horovod", "required", "env", "said"),
    [
        (FOR_ANOTHER_TORCH, False, {}, [DOES_NOT_LOAD, ALONE]),
        (FOR_ANOTHER_TORCH, False, {"HOROVOD_SIZE": "2"}, [DOES_NOT_LOAD, NEEDED]),
        (NOT_INSTALLED, True, {}, [NEEDED]),
    ],
)
def test_horovod_that_is_missing_is_one_sentence(run_python, horovod, required, env, said):
    code = f"""
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.distributed import setup_horovod
run_cli(lambda _: setup_horovod(require_distributed={required}) and 0)
"""
    done = run_python(code, horovod, **env)
    assert done.stderr.splitlines() == said
    assert done.returncode == (2 if NEEDED in said else 0)


LAUNCHED = """
import os
from horovod_lm.utils.distributed import setup_horovod
from horovod_lm.utils.errors import DistributedError
for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
    for os.environ[name] in ("2", "1", "no number"):
        try:
            print(*setup_horovod(require_distributed=False)[:3])
        except DistributedError as error:
            print(error)
    del os.environ[name]
"""


def test_ranks_that_a_launcher_started_and_horovod_does_not_connect_are_refused(run_python):
    """As `srun` and `mpirun` start them, without an MPI in Horovod."""
    pytest.importorskip("horovod.torch")
    lines = run_python(LAUNCHED).stdout.splitlines()
    assert lines[1::3] == lines[2::3] == ["1 0 0"] * 4
    for line in lines[::3]:
        assert re.match(r"this process was started as one of 2 \([A-Z0-9_]+\), but Horovod sees 1: "
                        "start it with", line)  # fmt: skip


@pytest.mark.parametrize(
    ("threads", "local_size", "omp", "cores", "wanted"),
    [
        ("auto", 1, None, 8, None),  # alone: torch's own choice
        ("auto", 2, None, 8, 4),
        ("auto", 3, None, 8, 2),
        ("auto", 4, None, 2, 1),  # more ranks than cores
        ("auto", 2, "3", 8, None),  # the user's variable wins
        (5, 2, "3", 8, 5),  # the user's setting is newer than that
    ],
)
def test_a_hosts_cores_are_shared(monkeypatch, threads, local_size, omp, cores, wanted):
    chosen = []
    monkeypatch.setattr(distributed, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    distributed.set_threads(DistributedConfig(threads_per_rank=threads), local_size)
    assert chosen == ([] if wanted is None else [wanted])


def rank(gpu: str | None = None, nccl: bool = True, host: str = "here") -> distributed._Rank:
    """Return what the other ranks know of a rank; `gpu` is the UUID of its GPU."""
    return distributed._Rank(host, gpu, "L4" if gpu else "", nccl)


@pytest.fixture
def agree(monkeypatch):
    """Call `agree_on_devices` on one of several ranks, where torch sees some GPUs."""

    def call(ranks: list, gpus: int, local_rank: int = 0, wanted: str = "auto"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(distributed, "is_distributed", lambda: True)
        monkeypatch.setattr(distributed, "_describe_rank", lambda device: ranks[local_rank])
        monkeypatch.setattr(distributed, "gather_objects", lambda value, name: ranks)
        return distributed.agree_on_devices(wanted, local_rank)

    return call


STAGED, NCCL = ", gradients reduced in CPU memory", ", gradients reduced by NCCL"


@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize("gpus", [0, 1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gets_a_device_and_all_agree(agree, size, gpus, nccl):
    ranks = [rank(f"uuid {number % gpus}" if gpus else None, nccl) for number in range(size)]
    choices = [agree(ranks, gpus, number) for number in range(size)]
    for number, choice in enumerate(choices):
        wanted = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
        assert choice.device == wanted
    # NCCL refuses two ranks on one GPU; Horovod without NCCL cannot reduce what is on a GPU.
    may_stay = gpus == 0 or (nccl and size <= gpus)
    assert {choice.staged for choice in choices} == {not may_stay}
    [summary] = {choice.summary for choice in choices}
    used = min(size, gpus)
    where = f"{used} GPU{'s' * (used > 1)} (L4)" if gpus else "the CPU, 1 thread each"
    assert summary.startswith(f"{size} rank{'s' * (size > 1)} on {where}")
    if gpus and size > 1:
        assert summary.endswith(NCCL if may_stay else STAGED)


@pytest.mark.parametrize(
    ("other", "staged", "summary"),
    [
        # A launcher may show each rank one GPU only, as number 0.
        (rank("b"), False, "2 ranks on 2 GPUs (L4)" + NCCL),
        (rank(None, host="there"), True, "2 ranks on 1 GPU (L4) and the CPU" + STAGED),
        (rank("b", nccl=False, host="there"), True, "2 ranks on 2 GPUs (L4)" + STAGED),
    ],
)
def test_hosts_that_differ_agree(agree, other, staged, summary):
    choice = agree([rank("a"), other], gpus=1)
    assert (choice.device, choice.staged) == (torch.device("cuda", 0), staged)
    assert choice.summary == summary


def test_a_device_can_be_asked_for(agree):
    assert agree([rank(), rank()], gpus=1, wanted="cpu").device == torch.device("cpu")
    assert agree([rank("a")], gpus=1, wanted="cuda").device == torch.device("cuda", 0)
    with pytest.raises(ConfigError) as error:
        agree([rank("a"), rank(host="there")], gpus=1, wanted="cuda")
    assert str(error.value) == (
        "training.device is cuda, and torch sees no GPU on there: set it to auto or cpu, or run"
        f" {command('horovod_lm.setup.doctor')} there"
    )


def test_every_helper_on_two_ranks(start, tmp_path):
    script = ROOT / "tests" / "ranks_distributed.py"
    env = {"HOROVOD_CYCLE_TIME": "4.5"}  # the user's own
    finished = start([str(script), str(tmp_path)], ranks=2, env=env).wait(120)
    assert finished.code == 0, finished.output[-4000:]
    assert (tmp_path / "worked").read_text() == "0\n"
    assert finished.output.count("all well") == 2
