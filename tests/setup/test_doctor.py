"""The doctor: it finds what is wrong, says how to fix it, and its exit code tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.setup import cuda, doctor, trial
from horovod_lm.setup.environment import make_command
from horovod_lm.setup.finding import FAIL, OK, WARN, Finding
from horovod_lm.utils import machine
from tests.conftest import ROOT


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


@pytest.mark.horovod
def test_a_machine_that_is_set_up_passes():
    command = [sys.executable, "-m", "horovod_lm.setup.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    report = json.loads(done.stdout)
    found = by_subject(Finding(**finding) for finding in report["findings"])
    fails = [finding for finding in found.values() if finding.verdict == FAIL]
    assert done.returncode == 0 and report["works"] is True and not fails
    assert "built here with the patches" in found["Horovod"].message
    assert found["transports"].message.startswith("gloo yes")
    assert "an allreduce of 4 MB takes" in found["two ranks"].message
    assert all(finding.fix or finding.verdict == OK for finding in found.values())


def test_without_horovod_it_fails_and_says_what_to_run(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda: None)
    fix = "python -m horovod_lm.setup.install_horovod"
    assert list(doctor.check_horovod()) == [Finding("Horovod", FAIL, "not installed", fix)]


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(600)", "it hangs: not done after 5 s"),
    ],
)
def test_a_horovod_that_breaks_its_process_does_not_break_the_doctor(
    tmp_path, monkeypatch, fault, said
):
    (tmp_path / "horovod" / "torch").mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (tmp_path / "horovod" / "torch" / "__init__.py").write_text(fault)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if "hangs" in said:
        monkeypatch.setattr(trial, "SECONDS", 5)
    [finding] = doctor.check_horovod()
    assert finding.verdict == FAIL and said in finding.message
    assert finding.fix == "python -m horovod_lm.setup.install_horovod --force"


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("gpus", "verdict", "message", "fix"),
    [
        (1, OK, "gradients on GPUs are reduced in CPU memory, which is right for one", ""),
        (2, WARN, "gradients on GPUs are reduced in CPU memory", "for speed: "),
    ],
)
def test_a_build_that_lacks_a_transport(monkeypatch, gpus, verdict, message, fix):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    found = trial.Trial({"gloo": True, "nccl": False}, 1.0)
    monkeypatch.setattr(doctor, "try_horovod", lambda: found)
    transports = by_subject(doctor.check_horovod())["transports"]
    assert transports.verdict == verdict and message in transports.message
    assert transports.fix.startswith(fix) and bool(transports.fix) is bool(fix)


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "hidden", "message", "fix"),
    [
        (None, None, None, "is a CPU build", " -m pip uninstall --yes torch && make setup"),
        ((12, 4), "13.0", None, "driver supports CUDA 12.4, and torch needs CUDA 13.0", "nvidia"),
        ((12, 4), "12.8", "", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"),
        (None, "13.0", None, "but torch finds no GPU", "run nvidia-smi"),
    ],
)
def test_a_driver_without_a_gpu_is_explained(monkeypatch, driver, torch_cuda, hidden, message, fix):
    for module in (machine, cuda):
        monkeypatch.setattr(module, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(cuda, "driver_cuda", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = doctor.missing_gpu(torch_cuda)
    assert finding.verdict == WARN and message in finding.message and fix in finding.fix


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
    assert "could not be checked" not in done.stdout
    assert not place.exists()


@pytest.mark.parametrize(
    ("threads", "quota", "cores", "message", "fix"),
    [
        ("4096", None, None, "more threads than cores", "unset OMP_NUM_THREADS, or set it to"),
        (None, 1.0, WARN, "two ranks get 1 each", ""),
    ],
)
def test_too_many_threads_and_one_core_are_warnings(
    monkeypatch, threads, quota, cores, message, fix
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    if quota:
        monkeypatch.setattr(machine, "container_cores", lambda: quota)
    found = by_subject(doctor.check_cores())
    assert found["cores"].verdict == cores or not quota
    assert message in found["threads"].message and fix in found["threads"].fix
    assert not quota or "CPU quota: 1)" in found["cores"].message


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch, capsys):
    def check_the_weather():
        raise RuntimeError("no window")

    checks = {"the weather": check_the_weather, "disk": lambda: [Finding("disk", OK, "empty")]}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "fail  the weather could not be checked: RuntimeError: no window",
        "                  -> fix what fails above, or run: "
        + make_command("setup", Path(sys.prefix)),
        "ok    disk        empty",
        "1 problem(s) to fix.",
    ]
