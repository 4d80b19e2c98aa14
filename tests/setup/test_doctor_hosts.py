"""The doctor of several hosts, on hosts of network namespaces with one thing wrong at a time."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from horovod_lm.teaching.simulated_hosts import Hosts, why_not_here
from horovod_lm.training import host_check as host_facts
from horovod_lm.utils.config import load_config, save_config
from tests.conftest import ROOT

WHY_NOT = why_not_here()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
SECONDS = 30  # for the whole examination, a host that is silent included


@pytest.fixture(autouse=True)
def package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def project(tiny_project, tmp_path) -> Iterator[Path]:
    """A copy of the tiny project that a test may spoil."""
    yield Path(shutil.copytree(tiny_project, tmp_path / "project"))


def diagnose(there: Hosts, project: Path, **distributed: object) -> tuple[int, list[dict]]:
    """Run the doctor on host0; return its exit code and what it found."""
    config = there.configure(load_config(project / "configs" / "tiny.yaml"))
    save_config(
        config.with_overrides({"distributed": distributed}), project / "configs" / "cluster.yaml"
    )
    command = [sys.executable, "-m", "horovod_lm.setup.doctor", "--hosts", "configs/cluster.yaml"]
    started = time.monotonic()
    done = there.run([*command, "--json"], cwd=project)
    assert time.monotonic() - started < SECONDS
    report = json.loads(done.stdout)
    assert report["works"] == (done.returncode == 0)
    return done.returncode, report["findings"]


def the_fault(found: tuple[int, list[dict]], verdict: str = "fail") -> dict:
    """Return the only finding that is not ok."""
    code, findings = found
    [fault] = [one for one in findings if one["verdict"] != "ok"]
    assert fault["verdict"] == verdict and code == (verdict == "fail") and fault["cure"]
    return fault


def with_variable(**environment: str) -> list[dict]:
    return [{"name": "host0"}, {"name": "host1", "environment": environment}]


def fake_package(folder: Path, name: str, version: str) -> str:
    """Make a folder in which pip would find another version; return the host's PYTHONPATH."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_three_good_hosts_can_train_together(project):
    with Hosts(3) as hosts:
        code, findings = diagnose(hosts, project)
    assert code == 0 and {one["verdict"] for one in findings} == {"ok"}
    assert [one["subject"] for one in findings[::9]] == ["host0", "host1", "host2"]
    said = [one["says"] for one in findings if one["subject"] == "host2"]
    assert said[0] == "reached, as root@host2"
    kinds = [text.partition(":")[0] for text in said[1:]]
    assert kinds == ["python", "torch", "horovod", "code", "data", "interface", "clock", "ports"]
    assert "interface: hv0 is 198.18.0.3" in said and "ports: calls host0, host1, host2" in said


@pytest.mark.parametrize("package", ["torch", "horovod"])
def test_another_version_on_one_host_is_named(package, project, tmp_path):
    path = fake_package(tmp_path / "other", package, "9.9")
    with Hosts(2) as hosts:
        fault = the_fault(diagnose(hosts, project, hosts=with_variable(PYTHONPATH=path)))
    assert fault["subject"] == "host1"
    assert fault["says"].startswith(f"{package}: 9.9, but host0 has ")


def test_other_code_on_one_host_is_named(project, tmp_path):
    ignore = shutil.ignore_patterns("__pycache__")
    other = shutil.copytree(ROOT / "horovod_lm", tmp_path / "other" / "horovod_lm", ignore=ignore)
    (other / "train.py").write_text((other / "train.py").read_text() + "# a local change\n")
    with Hosts(2) as hosts:
        found = diagnose(hosts, project, hosts=with_variable(PYTHONPATH=str(other.parent)))
    fault = the_fault(found)
    assert fault["subject"] == "host1" and fault["says"].startswith("code: ")


def test_other_data_on_one_host_are_named_and_missing_ones_are_no_fault(project):
    data = project / "data"
    kept = shutil.copytree(data, project / "kept")
    with Hosts(2, own_folders=[data]) as hosts:
        for name in hosts.names:
            assert the_verdicts(diagnose(hosts, project)) == {"ok"}
            hosts.run(["cp", "-r", f"{kept}/.", str(data)], name)
        tokens = data / "train.bin"
        change = f"import os; f = open({str(tokens)!r}, 'r+b'); f.seek(40); f.write(b'??')"
        hosts.run([sys.executable, "-c", change], "host1")
        fault = the_fault(diagnose(hosts, project))
    assert fault["subject"] == "host1" and fault["says"].startswith("data: ")
    assert fault["cure"] == f"on host1, delete {data}: training prepares it again"


def the_verdicts(found: tuple[int, list[dict]]) -> set[str]:
    return {one["verdict"] for one in found[1]}


def test_a_clock_that_is_wrong_is_a_warning(project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import time\ntrue = time.time\ntime.time = lambda: true() + 100\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with Hosts(2) as hosts:
        found = diagnose(hosts, project, hosts=with_variable(PYTHONPATH=path))
    fault = the_fault(found, "warn")
    assert fault["subject"] == "host1" and fault["says"] == "clock: 100.0 s ahead"


def test_an_interface_that_a_host_has_not_is_named(project):
    with Hosts(2) as hosts:
        rename = "ip link set hv0 down; ip link set hv0 name eth7; ip link set eth7 up"
        hosts.run(["sh", "-c", rename], "host1")
        code, findings = diagnose(hosts, project)
    faults = [one for one in findings if one["verdict"] == "fail"]
    assert code == 1 and [one["subject"] for one in faults] == ["host1"]
    assert (
        faults[0]["says"].startswith("interface: hv0 is not there") and "eth7" in faults[0]["says"]
    )


def test_a_firewall_between_two_of_three_hosts_is_named(project):
    rules = (
        "ip rule add pref 10 ipproto tcp sport 2222 lookup main; "  # ssh's answers may pass
        "ip rule add pref 20 ipproto tcp dport 1024-65534 to 198.18.0.1 prohibit"
    )
    with Hosts(3) as hosts:
        assert hosts.run(["sh", "-c", rules], "host1").returncode == 0
        code, findings = diagnose(hosts, project)
    faults = {one["subject"]: one["says"] for one in findings if one["verdict"] == "fail"}
    assert code == 1 and faults.keys() == {"host0", "host1"}
    assert faults["host0"].startswith("ports: cannot call host1: 198.18.0.2:")
    assert faults["host1"].startswith("ports: cannot call host0: 198.18.0.1:")


UNREACHABLE = {
    "key": (lambda hosts: {"ssh_identity_file": str(hosts.folder / "host_key")},
            "host1", "Permission denied", "authorized_keys"),
    "port": (lambda hosts: {"ssh_port": 2223}, "host1", "Connection refused", "ssh_port"),
    "name": (lambda hosts: {"hosts": [{"name": "host0"}, {"name": "hots1"}]},
             "hots1", "no address known here", "/etc/hosts"),
    "python": (lambda hosts: {"hosts": with_variable(PATH="/nowhere:/usr/bin:/bin")},
               "host1", "cannot be asked", "the same folders as here"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREACHABLE)
def test_a_host_that_cannot_be_asked_is_named_with_a_cure(what, project):
    changes, name, says, cure = UNREACHABLE[what]
    with Hosts(2) as hosts:
        fault = the_fault(diagnose(hosts, project, **changes(hosts)))
    assert fault["subject"] == name and says in fault["says"] and cure in fault["cure"], fault


def test_a_host_whose_cable_is_out_is_named(project):
    with Hosts(2) as hosts:
        hosts.unplug("host1")
        fault = the_fault(diagnose(hosts, project))
    assert fault["subject"] == "host1"  # whichever is first, ssh's limit or the neighbours' table
    assert fault["says"].endswith(("timed out", "No route to host")), fault


def test_a_name_that_means_this_machine_is_named(project):
    with Hosts(2, wrong_names={"host0": "127.0.1.1 host1"}) as hosts:
        fault = the_fault(diagnose(hosts, project))
    assert fault["subject"] == "host1" and fault["says"] == "means this machine here, as host0 does"


def test_hashes_follow_contents_and_nothing_else(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a.py").write_text("a = 1\n")
        (folder / "metadata.json").write_text("{}")
        (folder / "train.bin").write_bytes(bytes(3_000_000))
    (two / "__pycache__").mkdir()
    (two / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    assert host_facts.hash_of_code(one) == host_facts.hash_of_code(two)
    assert host_facts.hash_of_data(one) == host_facts.hash_of_data(two)
    (two / "a.py").rename(two / "b.py")
    (two / "train.bin").write_bytes(bytes(2_999_999) + b"1")
    assert host_facts.hash_of_code(one) != host_facts.hash_of_code(two)
    assert host_facts.hash_of_data(one) != host_facts.hash_of_data(two)
    assert host_facts.hash_of_data(tmp_path / "three") is None
