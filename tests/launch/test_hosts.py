"""Hostfiles and commands as horovodrun itself reads them, and why a job failed."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys

import pytest

from horovod_lm.launch import hosts as launcher
from horovod_lm.utils.config import Config, config_from_dict, load_config
from horovod_lm.utils.errors import ConfigError
from tests.conftest import ROOT


def with_hosts(hosts: list[dict], **distributed: object) -> Config:
    return config_from_dict({"distributed": {"hosts": hosts, **distributed}}, ROOT)


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be written"):
            launcher.replace_file(path, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


TWO = [{"name": "node1", "slots": 4}, {"name": "10.0.0.2", "slots": 2}]


def test_horovodrun_reads_the_command_and_the_hostfile_as_they_were_meant(monkeypatch, tmp_path):
    launch = pytest.importorskip("horovod.runner.launch")
    config = with_hosts(TWO, interface="eth0", ssh_port=2222, ssh_identity_file="/keys/id")
    hostfile = launcher.write_hostfile(config, tmp_path / "below" / "hostfile")
    command = ["python", "-m", "horovod_lm.train", "--set", "seed=1"]
    monkeypatch.setattr(sys, "argv", launcher.horovodrun_command(config, command, hostfile))
    read = launch.parse_args()
    assert read.num_proc == 6 and read.hostfile == str(hostfile)
    assert set(read.nics) == {"eth0"}
    assert (read.ssh_port, read.ssh_identity_file) == (2222, "/keys/id")
    assert read.command == command
    parsers = importlib.import_module("horovod.runner.common.util.hosts")
    assert parsers.parse_host_files(str(hostfile)) == "node1:4,10.0.0.2:2"


def test_variables_reach_the_ranks_of_their_host_and_no_command_line(tmp_path):
    variables = {"ALL": "a secret", "CUDA_VISIBLE_DEVICES": "2", "MINE": "no"}
    hosts = [TWO[0], {**TWO[1], "environment": {"MINE": "it's $HOME\na secret"}}]
    config = with_hosts(hosts, environment=variables)
    hostfile = launcher.write_hostfile(config, tmp_path / "a hostfile")
    show = "import json, os; print(json.dumps([os.environ[name] for name in ('ALL', 'MINE')]))"
    call = launcher.horovodrun_command(config, [sys.executable, "-c", show], hostfile)
    assert "secret" not in shlex.join(call)
    file = launcher.environment_file(hostfile)
    assert file.stat().st_mode & 0o777 == 0o600
    ranks = call[call.index("sh") :]
    for host, mine in (("node1", "no"), ("10.0.0.2", "it's $HOME\na secret")):
        rank = ["env", f"HOROVOD_HOSTNAME={host}", *ranks]
        assert json.loads(subprocess.check_output(rank)) == ["a secret", mine]
    launcher.write_hostfile(with_hosts(TWO), hostfile)
    assert not file.exists()
    done = subprocess.run(rank, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: 10.0.0.2 lacks {file}: copy it from the first host\n"


@pytest.mark.parametrize(
    ("hosts", "sentence"),
    [
        ([], "distributed.hosts is empty"),
        ([*TWO, TWO[0]], "names node1 2 times"),
        (TWO, "hosts cannot be written: "),
    ],
)
def test_what_cannot_work_is_a_sentence(hosts, sentence):
    with pytest.raises(ConfigError, match=sentence):
        launcher.write_hostfile(with_hosts(hosts), "/dev/null/hosts")


def test_a_wrong_name_is_named_with_its_fix():
    nowhere = "there.is.no.such.host.invalid"
    hosts = [{"name": name} for name in ("localhost", nowhere, "127.0.0.1")]
    wrong = launcher.wrong_names(with_hosts(hosts))
    assert wrong[nowhere][0] == "has no address known here"
    assert wrong["127.0.0.1"][0] == (
        "has an address of this machine (127.0.0.1), as localhost does"
    )
    assert wrong.keys() == {nowhere, "127.0.0.1"}
    with pytest.raises(ConfigError, match=f"^{nowhere} has no address known here: correct it in"):
        launcher.run(with_hosts(hosts), ["true"], "hostfile", "cluster.yaml")


def test_the_shipped_cluster_is_the_model_of_config_yaml_on_several_hosts():
    shipped, single = (
        load_config(ROOT / "configs" / name) for name in ("cluster.yaml", "config.yaml")
    )
    assert shipped.model == single.model
    assert len(shipped.distributed.hosts) > 1 and shipped.distributed.interface


def test_the_command_line_writes_the_hostfile_and_prints_a_command_but_starts_nothing(tmp_path):
    hostfile = tmp_path / "hostfile"
    hosts = "distributed.hosts=[{name: localhost, slots: 2}]"
    done = subprocess.run(
        [sys.executable, "-m", "horovod_lm.launch.hosts", "--config", "configs/cluster.yaml",
         "--hostfile", str(hostfile), "--set", hosts],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert hostfile.read_text() == "localhost slots=2\n"
    assert shlex.split(done.stdout) == [
        "horovodrun", "-np", "2", "--disable-cache", "--hostfile", str(hostfile),
        "--network-interfaces", "eth0", "--ssh-port", "22",
        "python", "-m", "horovod_lm.train", "--config", "configs/cluster.yaml", "--set", hosts,
    ]  # fmt: skip


# ---- why a job failed ----------------------------------------------------------------------------

LOST = "[{0}]<stderr>:error: rank {0} lost another rank after step 7; saved x.pt"
WATCHDOG = "[4]<stderr>:rank 4 (process 117) stood still for 7 s: it was killed, so that"


@pytest.mark.parametrize(
    ("lines", "rank", "code", "sentence"),
    [
        ([LOST.format(rank) for rank in (0, 1, 2, 3, 5)], 0, 2, "rank 4 on 10.0.0.2 stopped resp"),
        ([LOST.format(0), WATCHDOG], 4, 255, "rank 4 on 10.0.0.2 stopped responding"),
        ([LOST.format(0), "[5]<stderr>:error: no disk left"], 5, 2,
         "rank 5 on 10.0.0.2 failed first: it ended with exit code 2; see above"),
        ([], 3, -9, "rank 3 on node1 failed first: it was killed by SIGKILL, exit code 137"),
    ],
)  # fmt: skip
def test_the_rank_that_hung_or_failed_is_named_and_not_a_survivor_that_ended_first(
    lines, rank, code, sentence
):
    first = f"horovodrun: process {rank} was the first to fail, with exit code {code}"
    said = launcher.explain(with_hosts(TWO), [*lines, first], {}, "cluster.yaml")
    assert said.startswith(sentence)
