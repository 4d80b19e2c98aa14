"""The file of hosts of an elastic job, as horovodrun sees it."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys

import pytest

from horovod_lm.launch.elastic_hosts import (
    elastic_command,
    loopback_name,
    main,
    read_hosts,
    write_discovery_script,
    write_hosts,
)
from horovod_lm.launch.hosts import environment_file
from horovod_lm.utils.errors import ConfigError


def test_names_of_this_machine_differ_and_mean_the_same_address():
    names = [loopback_name(number) for number in range(5)]
    assert names[:2] == ["localhost", "127.0.0.1"] and len(set(names)) == 5
    assert {socket.gethostbyname(name) for name in names} == {"127.0.0.1"}


def test_the_script_prints_what_the_file_says_now_without_comments_and_blank_lines(tmp_path):
    hosts_file = write_hosts(tmp_path / "a folder" / "it's hosts", ["one:1"])
    script = write_discovery_script(hosts_file)
    assert subprocess.check_output([script], text=True) == "one:1\n"
    hosts_file.write_text("# mine\n\none:1  # the first\n  two:3\n")
    assert subprocess.check_output([script], text=True) == "one:1\ntwo:3\n"
    assert read_hosts(hosts_file) == {"one": 1, "two": 3}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"localhost:1\nlocalhost slots=2\n", "line 2: 'localhost slots=2' is not a host"),
        (b"localhost:two", "line 1: 'localhost:two' is not a host: write NAME:SLOTS"),
        (b"localhost:0", "line 1: 'localhost:0' is not a host"),
        (b"one:1\n# two\none : 2\n", "line 3: one is named twice: name it once, with the sum"),
        (b"user@one:1", "line 1: 'user@one:1' is not a host"),
        (b"\xef\xbb\xbfone:1", "is not a host: write NAME:SLOTS"),
        (b"::1:2", "line 1: '::1:2' is not a host"),
        (b"# nobody yet\n\n", "has no host: write a line NAME:SLOTS for each"),
        (b"h\xe9te:1", "cannot be read"),
    ],
)
def test_a_file_that_names_no_hosts_is_refused_in_a_sentence(tmp_path, content, sentence):
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        elastic_command(["true"], tmp_path / "hosts")
    assert str(tmp_path / "hosts") in str(caught.value)
    if "named twice" not in sentence:  # which horovodrun reads: the last number of slots counts
        # In a running job the script fails: horovodrun warns, and keeps the hosts that it has.
        script = write_discovery_script(tmp_path / "hosts")
        done = subprocess.run([script], capture_output=True)
        assert done.returncode != 0 and not done.stdout


@pytest.mark.parametrize(
    ("hosts", "np", "on_loopback"),
    [(["localhost:1", "127.0.0.1:1"], "2", True), (["localhost:1", "gpu7:4"], "5", False)],
)
def test_the_command_fits_the_hosts(tmp_path, hosts, np, on_loopback):
    hosts_file = write_hosts(tmp_path / "hosts", hosts)
    call = elastic_command(["python", "train.py"], hosts_file, min_np=2, max_np=8)
    assert call[0] == "horovodrun" and call[-2:] == ["python", "train.py"]
    options = dict(zip(call[1:-2:2], call[2:-2:2], strict=True))
    assert (options["-np"], options["--min-np"], options["--max-np"]) == (np, "2", "8")
    assert ("--network-interfaces" in options) == on_loopback
    assert "--ssh-port" not in options and "--ssh-identity-file" not in options


def test_horovodrun_reads_the_printed_command_as_it_was_meant(tmp_path, capsys):
    hosts_file = tmp_path / "hosts"
    settings = ["--config", "configs/laptop.yaml", "--set", "data.path=[my book.txt]"]
    settings += ["--set", "distributed.ssh_port=2222"]
    settings += ["--set", "distributed.ssh_identity_file=/my keys/id"]
    settings += ["--set", "distributed.ssh_user=ann", "--set", "distributed.environment={A: b c}"]
    assert main([str(hosts_file), "--workers", "3", *settings]) == 0
    call = shlex.split(capsys.readouterr().out)
    assert call[-12:] == settings
    assert "A=b c" not in call
    assert environment_file(hosts_file).read_text() == "export 'A=b c'\n"
    assert read_hosts(hosts_file) == {"localhost": 1, "127.0.0.1": 1, "127.0.0.01": 1}
    launch = pytest.importorskip("horovod.runner.launch")
    parse = f"""from {launch.__name__} import parse_args; told = parse_args()
print(told.num_proc, told.ssh_port, told.ssh_identity_file)"""
    run = subprocess.run(
        [sys.executable, "-c", parse, *call[1:]], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "3 2222 '/my keys/id' -l ann\n", run.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["FOLDER/hosts", "--workers", "0"], "--workers must be at least 1, not 0"),
        (["FOLDER/file/deep/hosts"], "FOLDER/file/deep/hosts cannot be written: Not a directory"),
        (["FOLDER"], "the file of hosts FOLDER cannot be read: "),
    ],
)
def test_what_cannot_work_is_a_sentence(tmp_path, options, sentence):
    (tmp_path / "file").touch()
    named = [option.replace("FOLDER", str(tmp_path)) for option in options]
    with pytest.raises(ConfigError, match=re.escape(sentence.replace("FOLDER", str(tmp_path)))):
        main([*named, "--config", "configs/tiny.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
