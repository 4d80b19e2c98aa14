"""The doctor of several hosts, on hosts of network namespaces with faults."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from horovod_lm.teaching.simulated_hosts import Hosts, why_not_here
from horovod_lm.utils.config import load_config, save_config
from tests.conftest import ROOT

WHY_NOT = why_not_here()
needs_hosts = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
SECONDS = 60  # for the whole check, with a host that does not answer
RENAME = "ip link set {0} down; ip link set {0} name {1}; ip link set {1} up"
# Between host0 and host1; answers of sshd may pass.
FIREWALL = (
    "ip rule {0} pref 10 ipproto tcp sport 2222 lookup main; "
    "ip rule {0} pref 20 ipproto tcp dport 1024-65534 to 198.18.0.1 prohibit"
)


@pytest.fixture(autouse=True)
def package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def project(tiny_project, tmp_path_factory) -> Path:
    """A copy of the tiny project."""
    return Path(shutil.copytree(tiny_project, tmp_path_factory.mktemp("copy") / "project"))


@pytest.fixture(scope="module")
def hosts(project) -> Iterator[Hosts]:
    """Three hosts with data folders of their own, empty at first; host0 calls itself host9, too."""
    with Hosts(3, own_folders=[project / "data"]) as three:
        names = three.folder / "host0.hosts"
        names.write_text(f"127.0.1.1 host9\n{names.read_text()}")
        yield three


def diagnose(there: Hosts, project: Path, **distributed: object) -> list[dict[str, str]]:
    """Run the doctor on host0, check its exit code, and return what it found."""
    config = there.configure(load_config(project / "configs" / "tiny.yaml"))
    save_config(
        config.with_overrides({"distributed": distributed}), project / "configs" / "cluster.yaml"
    )
    command = [sys.executable, "-m", "horovod_lm.setup.doctor", "--hosts", "configs/cluster.yaml"]
    started = time.monotonic()
    done = there.run([*command, "--json"], cwd=project)
    assert time.monotonic() - started < SECONDS
    report = json.loads(done.stdout)
    fails = any(one["verdict"] == "fail" for one in report["findings"])
    assert report["works"] is not fails and done.returncode == fails
    return report["findings"]


def faults(found: list[dict[str, str]]) -> list[dict[str, str]]:
    wrong = [one for one in found if one["verdict"] != "ok"]
    assert all(one["fix"] for one in wrong)
    return wrong


@needs_hosts
def test_other_versions_code_and_time_on_a_host_are_named(hosts, project, tmp_path):
    for name in ("torch", "horovod"):
        metadata = tmp_path / f"{name}-9.9.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "horovod_lm", tmp_path / "horovod_lm", ignore=ignore)
    with (tmp_path / "horovod_lm" / "train.py").open("a") as file:
        file.write("# a local change\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import time\ntrue = time.time\ntime.time = lambda: true() + 100\n"
    )
    names = [{"name": "host0"}, {"name": "host1", "environment": {"PYTHONPATH": str(tmp_path)}}]
    wrong = faults(diagnose(hosts, project, hosts=names))
    assert {one["subject"] for one in wrong} == {"host1"}
    torch, horovod, code, clock = wrong
    assert torch["message"].startswith("torch: 9.9, but host0 has ")
    assert horovod["message"].startswith("horovod: 9.9, but host0 has ")
    assert code["message"].startswith("code: ") and code["fix"].startswith("copy the project from")
    assert clock["verdict"] == "warn" and clock["message"] in (
        "clock: 99.9 s ahead", "clock: 100.0 s ahead"
    )  # fmt: skip


@needs_hosts
def test_other_data_on_a_host_are_named(hosts, project, tiny_project):
    data, tokens = project / "data", project / "data" / "train.bin"
    copy = ["cp", "-r", f"{tiny_project}/data/.", str(data)]
    hosts.run(copy, "host0")
    hosts.run(copy, "host1")
    change = f"import os; f = open({str(tokens)!r}, 'r+b'); f.seek(40); f.write(b'??')"
    hosts.run([sys.executable, "-c", change], "host1")
    findings = diagnose(hosts, project)
    [fault] = faults(findings)
    assert fault["subject"] == "host1" and fault["message"].startswith("data: ")
    assert fault["fix"] == f"on host1, delete {data}: training prepares it again"
    hosts.run(copy, "host1")
    said = [one["message"] for one in findings if one["subject"] == "host2"]
    assert said[0] == "reached, as root@host2"
    assert "data: not prepared yet: training does it" in said
    assert "interface: hv0 is 198.18.0.3" in said
    assert "ports: connects to host0, host1, host2" in said


@needs_hosts
def test_a_missing_interface_and_a_firewall_are_named(hosts, project):
    hosts.run(["sh", "-c", RENAME.format("hv0", "eth7")], "host2")
    hosts.run(["sh", "-c", FIREWALL.format("add")], "host1")
    wrong = {one["subject"]: one["message"] for one in faults(diagnose(hosts, project))}
    hosts.run(["sh", "-c", RENAME.format("eth7", "hv0")], "host2")
    hosts.run(["sh", "-c", FIREWALL.format("del")], "host1")
    assert wrong.keys() == {"host0", "host1", "host2"}
    assert wrong["host0"].startswith("ports: cannot connect to host1: 198.18.0.2:")
    assert wrong["host1"].startswith("ports: cannot connect to host0: 198.18.0.1:")
    assert wrong["host2"].startswith("interface: hv0 does not exist") and "eth7" in wrong["host2"]


PATH = {"PATH": "/nowhere:/usr/bin:/bin"}
UNREACHABLE = {
    "names": (
        {"hosts": [{"name": "host0"}, {"name": "host9"}, {"name": "hots1"},
                   {"name": "host2", "environment": PATH}]},
        [("host9", "has an address of this machine (127.0.1.1), as host0 does", "/etc/hosts"),
         ("hots1", "has no address known here", "/etc/hosts"),
         ("host2", "does not answer: ", "the same folders as here")],
    ),
    "port": (
        {"ssh_port": 2223},
        [(name, "Connection refused", "ssh_port") for name in ("host1", "host2")],
    ),
    "key": (
        {"ssh_identity_file": "host_key", "hosts": [{"name": "host0"}, {"name": "host1"}]},
        [("host1", "Permission denied", "authorized_keys")],
    ),
}  # fmt: skip


@needs_hosts
@pytest.mark.parametrize("what", UNREACHABLE)
def test_hosts_that_cannot_be_reached_are_named_with_a_fix(what, hosts, project):
    changes, expected = UNREACHABLE[what]
    if what == "key":
        changes = changes | {"ssh_identity_file": str(hosts.folder / "host_key")}
    wrong = faults(diagnose(hosts, project, **changes))
    assert len(wrong) == len(expected)
    for fault, (name, message, fix) in zip(wrong, expected, strict=True):
        assert fault["subject"] == name and message in fault["message"] and fix in fault["fix"]


@needs_hosts
def test_a_host_whose_cable_is_out_is_named(hosts, project):
    hosts.unplug("host2")
    [fault] = faults(diagnose(hosts, project))
    hosts.plug_in("host2")
    assert fault["subject"] == "host2"  # whichever is first, ssh's limit or the neighbours' table
    assert fault["message"].endswith(("timed out", "No route to host")), fault
