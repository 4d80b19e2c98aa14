"""The functions around Horovod: on two real ranks, before init, and without Horovod."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from horovod_lm.utils import distributed
from horovod_lm.utils.cli import command
from horovod_lm.utils.config import DistributedConfig
from horovod_lm.utils.errors import ConfigError
from tests.conftest import ROOT

# Replacements of Horovod's package. A build for another torch raises OSError when it is loaded.
MISSING = "raise ModuleNotFoundError(\"No module named 'horovod'\", name='horovod')"
BROKEN = "raise OSError('mpi_lib_v2.so: undefined symbol: _ZN3c10\\nand a second line')"

HELPERS = """
import torch
from horovod_lm.utils import distributed as d
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
assert d.distributed_optimizer(optimizer, model.named_parameters(), 4) is optimizer
model.weight.sum().backward()
d.synchronize(optimizer)
with d.already_synchronized(optimizer):
    pass
assert model.weight.grad.item() == 1
done = []
d.local_rank_zero_first(lambda: done.append(1))
d.broadcast_parameters(model)
d.shutdown()
value = torch.tensor([1.5, 2.0], requires_grad=True)
assert d.reduce_sum(value, "a").tolist() == [1.5, 2.0]
assert d.finish_reduce_sum(d.start_reduce_sum(value, "b")).tolist() == [1.5, 2.0]
assert (d.get_rank(), d.get_world_size(), d.get_local_rank(), d.get_local_size()) == (0, 1, 0, 1)
assert d.is_main_process() and not d.is_distributed() and done == [1]
assert d.metric_average(2.5, name="c") == d.metric_average(torch.tensor(2.5), "d") == 2.5
assert d.broadcast_object([1], "e") == [1] and d.gather_objects("x", "f") == ["x"]
assert d.setup_horovod(require_distributed=False)[:3] == (1, 0, 0)
assert d.setup_horovod(False)[:3] == (1, 0, 0)
assert not d.is_distributed()
print("all well")
"""


@pytest.fixture
def run_python(tmp_path):
    """Run Python code in a fresh process, with a `horovod` of our choosing."""

    def run(code: str, horovod: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT)]
        if horovod is not None:
            (tmp_path / "horovod").mkdir(exist_ok=True)
            (tmp_path / "horovod" / "__init__.py").write_text(horovod)
            paths.insert(0, str(tmp_path))
        clean = {name: value for name, value in os.environ.items() if "HOROVOD_" not in name}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
            env=clean | {"PYTHONPATH": os.pathsep.join(paths)} | env,
        )  # fmt: skip

    return run


ALONE = "note: Horovod is not installed: training alone, in one process"
DOES_NOT_LOAD = (
    "note: Horovod is installed but does not load (mpi_lib_v2.so: undefined symbol: _ZN3c10):"
    " run python -m horovod_lm.setup.install_horovod"
)


@pytest.mark.parametrize(
    ("horovod", "notes"), [(None, []), (MISSING, [ALONE]), (BROKEN, [DOES_NOT_LOAD, ALONE])]
)
def test_every_helper_works_before_init_and_without_horovod(run_python, horovod, notes):
    # Fault 4: Horovod before init raises ValueError, not ImportError.
    if horovod is None:
        pytest.importorskip("horovod.torch")
    done = run_python(("import horovod.torch\n" if horovod is None else "") + HELPERS, horovod)
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr
    assert done.stderr.splitlines() == notes


@pytest.mark.parametrize(
    ("horovod", "required", "env"),
    [(MISSING, True, {}), (BROKEN, False, {"HOROVOD_SIZE": "2"})],
)
def test_horovod_that_is_needed_and_missing_is_one_sentence(run_python, horovod, required, env):
    code = f"""
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.distributed import setup_horovod
run_cli(lambda _: setup_horovod(require_distributed={required}) and 0)
"""
    done = run_python(code, horovod, **env)
    assert done.returncode == 2
    (sentence,) = (line for line in done.stderr.splitlines() if not line.startswith("note: "))
    assert sentence == (
        f"error: Horovod is not installed for torch {torch.__version__}:"
        " run python -m horovod_lm.setup.install_horovod"
    )


LAUNCHED = """
import os, sys
from horovod_lm.utils.distributed import setup_horovod
from horovod_lm.utils.errors import DistributedError
for name, value in (one.split("=") for one in sys.argv[1:]):
    os.environ[name] = value
    try:
        print(*setup_horovod(require_distributed=False)[:3])
    except DistributedError as error:
        print(error)
    del os.environ[name]
"""


def test_ranks_that_a_launcher_started_and_horovod_does_not_connect_are_refused(run_python):
    """As `srun` and `mpirun` start them, without an MPI in Horovod."""
    pytest.importorskip("horovod.torch")
    names = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    code = f"import sys\nsys.argv += {[f'{name}=2' for name in names]}\n{LAUNCHED}"
    lines = run_python(code).stdout.splitlines()
    for name, line in zip(names, lines, strict=True):
        said = f"this process was started as one of 2 ({name}), but Horovod sees 1: start it with"
        assert line.startswith(said)
    # One process under a launcher, and a value that is not a number.
    code = f"import sys\nsys.argv += ['PMI_SIZE=1', 'PMI_SIZE=']\n{LAUNCHED}"
    assert run_python(code).stdout.splitlines() == ["1 0 0"] * 2


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


@dataclass
class PretendedRank:
    """A rank in a thread of this process, with torch's and Horovod's answers replaced."""

    local_rank: int = 0
    gpus: tuple[str, ...] = ()  # the UUIDs of those that it sees
    nccl: bool = False
    host: str = "here"
    selected: int | None = None  # by torch.cuda.set_device


@pytest.fixture
def choose(monkeypatch):
    """Call `agree_on_devices` on ranks that meet; return what each of them got, or raised."""
    own = threading.local()

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name="L4", uuid=own.rank.gpus[device.index])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(own.rank.gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(own.rank.gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: setattr(own.rank, "selected", device.index)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(distributed.platform, "node", lambda: own.rank.host)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(
        distributed, "_horovod", lambda: SimpleNamespace(nccl_built=lambda: own.rank.nccl)
    )

    def on_all(ranks: list[PretendedRank], wanted: str = "auto") -> list:
        offers: dict[int, object] = {}
        everybody = threading.Barrier(len(ranks), timeout=10)

        def gather(value: object, name: str) -> list:
            offers[ranks.index(own.rank)] = value
            everybody.wait()
            return [offers[number] for number in range(len(ranks))]

        def work(rank: PretendedRank) -> object:
            own.rank = rank
            try:
                return distributed.agree_on_devices(wanted, rank.local_rank)
            except ConfigError as error:
                return str(error)

        monkeypatch.setattr(distributed, "gather_objects", gather)
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(work, ranks))

    return on_all


STAGED, NCCL = ", gradients reduced in CPU memory", ", gradients reduced by NCCL"


@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize("gpus", [0, 1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gets_a_device_and_all_agree(choose, size, gpus, nccl):
    ranks = [PretendedRank(number, tuple("abcd"[:gpus]), nccl) for number in range(size)]
    choices = choose(ranks)
    if gpus:
        wanted = [torch.device("cuda", number % gpus) for number in range(size)]
        assert [rank.selected for rank in ranks] == [device.index for device in wanted]
    else:
        wanted = [torch.device("cpu")] * size
    assert [choice.device for choice in choices] == wanted
    # NCCL refuses two ranks on one GPU; Horovod without NCCL cannot reduce what is on a GPU.
    may_stay = gpus == 0 or (nccl and size <= gpus)
    assert {choice.staged for choice in choices} == {not may_stay}
    [summary] = {choice.summary for choice in choices}
    used = min(size, gpus)
    where = f"{used} GPU{'s' * (used > 1)} (L4)" if gpus else "the CPU, 1 thread each"
    assert summary.startswith(f"{size} rank{'s' * (size > 1)} on {where}")
    if gpus and size > 1:
        assert summary.endswith(NCCL if may_stay else STAGED)


def test_a_gpu_that_each_rank_sees_as_its_only_one_is_its_own(choose):
    ranks = [PretendedRank(number, (uuid,), nccl=True) for number, uuid in enumerate("ab")]
    for choice in choose(ranks):
        assert (choice.device, choice.staged) == (torch.device("cuda", 0), False)
        assert choice.summary == "2 ranks on 2 GPUs (L4)" + NCCL


def test_hosts_that_differ_agree_to_stage(choose):
    with_gpu = PretendedRank(0, ("a",), nccl=True)
    for other, summary in (
        (PretendedRank(0, (), True, "there"), "2 ranks on 1 GPU (L4) and the CPU"),
        (PretendedRank(0, ("b",), False, "there"), "2 ranks on 2 GPUs (L4)"),
    ):
        choices = choose([with_gpu, other])
        assert [choice.staged for choice in choices] == [True, True]
        assert {choice.summary for choice in choices} == {summary + STAGED}
        assert choices[1].device.type == ("cuda" if other.gpus else "cpu")


def test_the_cpu_is_chosen_although_there_is_a_gpu(choose):
    ranks = [PretendedRank(number, ("a",), nccl=True) for number in range(2)]
    for choice in choose(ranks, "cpu"):
        assert (choice.device, choice.staged) == (torch.device("cpu"), False)
    assert [rank.selected for rank in ranks] == [None, None]


def test_a_gpu_that_is_asked_for_and_missing_is_one_sentence_on_every_rank(choose):
    ranks = [PretendedRank(0, ("a",)), PretendedRank(0, (), host="there")]
    assert set(choose(ranks, "cuda")) == {
        "training.device is cuda, and torch sees no GPU on there: set it to auto or cpu, or run"
        f" {command('horovod_lm.setup.doctor')} there"
    }
    assert [choice.device.type for choice in choose(ranks[:1], "cuda")] == ["cuda"]


@pytest.fixture(scope="module")
def ranks(start_for_module, tmp_path_factory):
    """What each of two ranks saw of every helper."""
    folder = tmp_path_factory.mktemp("ranks")
    script = ROOT / "tests" / "ranks_distributed.py"
    env = {"HOROVOD_CYCLE_TIME": "4.5"}  # the user's own
    finished = start_for_module([str(script), str(folder)], ranks=2, env=env).wait(120)
    assert finished.code == 0, finished.output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def both(ranks, key):
    """Return what both ranks saw, having made sure that it is the same."""
    assert ranks[0][key] == ranks[1][key]
    return ranks[0][key]


def test_setup_returns_world_size_rank_local_rank_and_gpu(ranks):
    # Before init, a launched rank can call every function.
    assert both(ranks, "before") == [False, 0, 1, True] and both(ranks, "launched")
    gpu = torch.cuda.is_available()
    assert [seen["setup"] for seen in ranks] == [[2, 0, 0, gpu], [2, 1, 1, gpu]]
    assert [seen["again"] for seen in ranks] == [seen["setup"] for seen in ranks]
    assert [seen["rank"] for seen in ranks] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert [seen["main"] for seen in ranks] == [True, False]
    assert both(ranks, "threads") == 1  # OMP_NUM_THREADS=1, which the fixture sets


def test_averages_and_sums_are_over_all_ranks(ranks):
    assert both(ranks, "average") == [1.5, 1.5, 2.0**-10]
    assert [seen["untouched"] for seen in ranks] == [0.0, 3.0]
    assert both(ranks, "sum") == [[[2, 4], [1, 2 * 10**9]], "torch.float64", "cpu"]
    assert both(ranks, "later") == [pytest.approx(0.2), 1.0]


def test_objects_come_in_the_order_of_ranks_and_from_the_root(ranks):
    assert both(ranks, "gathered") == [{"rank": 0, "text": "é"}, {"rank": 1, "text": "éé"}]
    assert both(ranks, "broadcast") == [{"from": 0}, ["one"]]
    assert both(ranks, "parameters") == [[5.0, 5.0]] * 3


def test_content_of_any_size_is_sent_bit_for_bit(ranks):
    content = json.loads(both(ranks, "content"))
    dtype, values = content["model"]["a"]
    wanted = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    assert (dtype, values) == ("torch.float32", wanted.tolist())
    assert content["model"]["b"][0] == "torch.bfloat16" and len(content["model"]["b"][1]) == 5
    assert content["optimizer"] == [
        [["torch.int64", 1], ["torch.bool", [True, False]]],
        {"none": ["torch.float32", []]},
    ]
    assert content["transposed"][1] == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert content["name"] == "é"
    assert max(both(ranks, "sizes")) == 16


def test_work_is_done_once_per_host_and_its_error_reaches_every_rank(ranks):
    assert both(ranks, "worked") == "0\n"
    assert both(ranks, "failed") == "a sentence from rank 0"


def test_gradients_are_summed_over_passes_averaged_over_ranks_and_reduced_once(ranks):
    assert both(ranks, "gradient") == [[4.0, 4.0], [4.0, 4.0]]
    assert both(ranks, "stepped") == [[1.0, 1.0], [1.0, 1.0]]


def test_settings_are_exported_and_the_users_environment_wins(ranks):
    for seen in ranks:
        environment = seen["environment"]
        assert environment["HOROVOD_FUSION_THRESHOLD"] == str(3 * 1024 * 1024)
        assert environment["HOROVOD_STALL_CHECK_TIME_SECONDS"] == "11"
        assert environment["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "22"
        assert environment["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "33"
        assert environment["HOROVOD_CYCLE_TIME"] == "4.5"  # not 7
        assert environment["HOROVOD_GLOO_IFACE"] != "no-such-interface"  # horovodrun's choice


def test_staged_gradients_give_the_bits_of_plain_horovod(ranks):
    """Over backward passes, reduction groups, clipping and float16."""
    cases = both(ranks, "staging")
    assert len(cases) == 16
    for case, (same_bits, *kept_in_place) in cases.items():
        assert same_bits, case
        # Horovod reduces the gradient where it is; staged, it reduces a copy.
        assert kept_in_place == ["fp16" not in case, False], case
