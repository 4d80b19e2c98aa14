"""The doctor: it finds what is wrong, says how to mend it, and its exit code tells."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.setup import doctor
from horovod_lm.setup.finding import FAIL, OK, WARN, Finding
from horovod_lm.utils import machine
from tests.conftest import ROOT

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="Horovod is not installed: python -m horovod_lm.setup.install_horovod",
)


def examine(*options: str, **variables: str) -> tuple[int, dict[str, Finding]]:
    """Run the doctor in a process of its own: its exit code, and its findings by subject."""
    done = subprocess.run(
        [sys.executable, *options, "-m", "horovod_lm.setup.doctor", "--json"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    report = json.loads(done.stdout)
    assert report["works"] is (done.returncode == 0)
    return done.returncode, {f["subject"]: Finding(**f) for f in report["findings"]}


@pytest.fixture(scope="module")
def packages_without_horovod(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is installed here but Horovod, for a process started with -S."""
    folder = tmp_path_factory.mktemp("packages")
    import torch

    for path in Path(torch.__file__).parents[1].iterdir():
        if path.name != "horovod" and not path.name.startswith("horovod-"):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.horovod
@needs_horovod
def test_a_machine_that_is_set_up_passes():
    code, found = examine()
    assert code == 0, [finding for finding in found.values() if finding.verdict == FAIL]
    assert found["Horovod"].verdict == OK and "built here with the patches" in found["Horovod"].says
    assert found["transports"].says.startswith("gloo yes")
    assert "an allreduce of 4 MB takes" in found["two ranks"].says
    assert all(finding.cure or finding.verdict == OK for finding in found.values())


def test_without_horovod_it_fails_and_says_what_to_run(packages_without_horovod):
    path = os.pathsep.join([str(ROOT), str(packages_without_horovod)])
    code, found = examine("-S", PYTHONPATH=path)
    assert code == 1
    assert found["Horovod"] == Finding(
        "Horovod", FAIL, "not installed", "python -m horovod_lm.setup.install_horovod"
    )
    assert found["torch"].verdict == OK  # one thing that fails hides no other


@pytest.mark.horovod
@needs_horovod
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"),
        ("import os; os.abort()", "ended by SIGABRT"),
    ],
)
def test_a_horovod_that_breaks_its_process_does_not_break_the_doctor(
    tmp_path, monkeypatch, fault, said
):
    (tmp_path / "horovod" / "torch").mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (tmp_path / "horovod" / "torch" / "__init__.py").write_text(fault)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [finding] = doctor.check_horovod()
    assert finding.verdict == FAIL and said in finding.says
    assert finding.cure == "python -m horovod_lm.setup.install_horovod --force"


@pytest.mark.horovod
@needs_horovod
@pytest.mark.parametrize(("gpus", "verdict"), [(1, OK), (2, WARN)])
def test_nccl_is_missed_where_there_are_several_gpus(monkeypatch, gpus, verdict):
    monkeypatch.setattr(doctor, "gpus_seen", lambda: gpus * ["a GPU"])
    built = {"gloo": True, "mpi": False, "nccl": False}
    monkeypatch.setattr(doctor, "try_one_rank", lambda: built)
    found = {finding.subject: finding for finding in doctor.check_horovod()}
    assert found["transports"].verdict == verdict
    assert "gradients on GPUs are reduced in CPU memory" in found["transports"].says
    assert found["transports"].cure.startswith("for speed: ") is (verdict == WARN)


@pytest.mark.horovod
@needs_horovod
def test_a_build_without_gloo_fails(monkeypatch):
    built = {"gloo": False, "mpi": True, "nccl": False}
    monkeypatch.setattr(doctor, "try_one_rank", lambda: built)
    found = {finding.subject: finding for finding in doctor.check_horovod()}
    assert found["transports"].verdict == FAIL and "--force" in found["transports"].cure


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "hidden", "says", "fix"),
    [
        (None, None, None, "is a CPU build", " -m pip uninstall --yes torch && make setup"),
        ((12, 4), "13.0", None, "driver supports CUDA 12.4, and torch needs CUDA 13.0", "nvidia"),
        ((13, 0), "13.2", "", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"),
        ((13, 0), "13.0", None, "but torch finds no GPU", "run nvidia-smi"),
        (None, "13.0", None, "but torch finds no GPU", "run nvidia-smi"),
    ],
)
def test_a_driver_without_a_gpu_is_explained(monkeypatch, driver, torch_cuda, hidden, says, fix):
    from horovod_lm.setup import cuda

    for module in (doctor, cuda):
        monkeypatch.setattr(module, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(cuda, "driver_cuda", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = doctor.missing_gpu(torch_cuda)
    assert finding.verdict == WARN and says in finding.says and fix in finding.cure


def test_where_there_is_no_environment_it_says_what_the_set_up_needs(tmp_path):
    program = ROOT / "horovod_lm" / "setup" / "bootstrap.py"
    place = tmp_path / "no environment"
    # -I -S: no package is installed.
    command = [sys.executable, "-I", "-S", str(program), "doctor", "--venv", str(place)]
    done = subprocess.run(
        command, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "fail  set-up      cannot start" in done.stdout
    assert "-> no `make` was found; on Debian or Ubuntu: apt-get install" in done.stdout
    assert f"-> make setup VENV='{place}'" in done.stdout
    assert "could not be looked at" not in done.stdout
    assert not place.exists()


def test_two_ranks_that_hang_are_given_up(monkeypatch, tmp_path):
    from horovod_lm.setup import trial

    hanging = tmp_path / "horovodrun"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(trial.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(trial, "SECONDS_FOR_RANKS", 0.5)
    [finding] = doctor.check_two_ranks()
    assert finding.verdict == FAIL and "it hangs: not done after" in finding.says


def test_a_missing_horovodrun_is_said(monkeypatch, tmp_path):
    from horovod_lm.setup import trial

    monkeypatch.setattr(trial.sys, "executable", str(tmp_path / "python"))
    [finding] = doctor.check_two_ranks()
    assert "horovodrun does not start: No such file or directory" in finding.says


def test_too_many_threads_are_a_warning_with_a_number(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    found = {finding.subject: finding for finding in doctor.check_cores()}
    assert found["threads"].verdict == WARN
    assert "unset OMP_NUM_THREADS, or set it to" in found["threads"].cure


def test_one_core_is_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "container_cores", lambda: 1.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = {finding.subject: finding for finding in doctor.check_cores()}
    assert found["cores"].verdict == WARN and "CPU quota: 1)" in found["cores"].says
    assert found["threads"].says.endswith("two ranks get 1 each")


def test_a_host_name_without_address_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "no-such-host.invalid")
    [finding] = doctor.check_host_name()
    assert finding.verdict == WARN and "/etc/hosts" in finding.cure


def test_a_name_that_means_loopback_is_said(monkeypatch):
    monkeypatch.setattr(doctor.socket, "gethostbyname", lambda name: "127.0.1.1")
    [finding] = doctor.check_host_name()
    assert finding.verdict == OK and "several: name the interface" in finding.says


def test_too_little_room_is_a_warning_with_its_number():
    finding = doctor.enough("disk", 0.5 * 2**30, 8 * 2**30, 1 * 2**30, "make room")
    assert finding == Finding(
        "disk", WARN, "0.5 GiB free of 8.0; 1 GiB are needed for comfort", "make room"
    )


def test_a_missing_compiler_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    [finding] = doctor.check_compiler()
    assert finding.verdict == WARN and "build-essential" in finding.cure


@pytest.mark.parametrize(
    ("seconds", "takes_bfloat16", "verdict"),
    [
        ({"float32": 3.0, "bfloat16": 1.0}, True, OK),
        ({"float32": 1.0, "bfloat16": 3.0}, False, OK),
        ({"float32": 1.0, "bfloat16": 1.0}, True, OK),
        ({"float32": 1.0, "bfloat16": 3.0}, True, WARN),
        ({"float32": 3.0, "bfloat16": 1.0}, False, WARN),
    ],
)
def test_flags_and_clock_that_disagree_are_a_warning(monkeypatch, seconds, takes_bfloat16, verdict):
    def clock(dtype, device):
        return seconds[str(dtype).removeprefix("torch.")]

    monkeypatch.setattr(machine, "matmul_seconds", clock)
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda device: takes_bfloat16)
    [finding] = doctor.check_bfloat16()
    assert finding.verdict == verdict
    assert bool(finding.cure) is (verdict == WARN)


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    def check_the_weather():
        raise RuntimeError("no window")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (check_the_weather, doctor.check_python))
    first, *others = doctor.examine(Path(sys.prefix))
    assert first.subject == "the weather" and first.verdict == FAIL
    assert "RuntimeError: no window" in first.says
    assert [finding.subject for finding in others] == ["Python", "horovod_lm"]


def test_the_report_puts_the_cure_under_the_line(monkeypatch, capsys):
    def check_disk():
        yield Finding("disk", FAIL, "full", "empty it")

    monkeypatch.setattr(doctor, "CHECKS", (check_disk,))
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "fail  disk        full",
        "                  -> empty it",
        "1 thing(s) to mend.",
    ]
