"""A watched build: what is shown, what is kept, and what is said when it fails."""

from __future__ import annotations

import io
import sys
import time

import psutil
import pytest

from horovod_lm.installation.progress import Progress, explain_failure, run_with_progress
from horovod_lm.utils.errors import UserError
from tests.conftest import alive

BUILD = """
import sys
print("  Running CMake in build/temp:")
print("  -- The CXX compiler identification is GNU 12.2.0")
for percent in (2, 1, 5, 12, 14, 100):
    print(f"  [{percent:3d}%] Building CXX object CMakeFiles/some.dir/file.cc.o")
print("  creating '/tmp/x/horovod-0.28.1.whl' and adding things to it")
sys.exit(int(sys.argv[1]))
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(code: int, log, stream) -> None:
    command = [sys.executable, "-c", BUILD, str(code)]
    run_with_progress(command, env={}, log=log, title="Horovod", stream=stream)


def shown(stream: io.StringIO) -> list[str]:
    """The lines shown, less the time that each ends with."""
    return [line.rsplit("  ", 1)[0].strip() for line in stream.getvalue().splitlines()]


def test_a_file_gets_a_plain_line_for_each_stage_and_tenth():
    stream = io.StringIO()
    progress = Progress("Horovod", stream)
    for line in ["Running CMake in x", *(f"[{n:3d}%] Building CXX" for n in range(0, 101, 5))]:
        progress.read(line)
        progress.show()
    tenths = [f"Horovod: compiling {n:3d} %" for n in range(0, 101, 10)]
    assert shown(stream) == ["Horovod: configuring", *tenths]


def test_a_terminal_gets_one_line_that_moves():
    stream = Terminal()
    progress = Progress("Horovod", stream)
    progress.read("[ 42%] Building CXX object x.o")
    progress.show()
    progress.show()
    progress.finish("built")
    assert stream.getvalue().count("\n") == 1
    assert "\r\x1b[K  Horovod: compiling  42 %  0m00s" in stream.getvalue()


def test_percent_never_goes_back():
    progress = Progress("Horovod", io.StringIO())
    for line in ("[ 40%] Building CXX", "[ 38%] Building CXX"):
        progress.read(line)
    assert progress.percent == 40


def test_all_output_is_kept(tmp_path):
    stream = io.StringIO()
    run(0, tmp_path / "log", stream)
    assert len((tmp_path / "log").read_text().splitlines()) == 9
    assert stream.getvalue().splitlines()[-1].startswith("  Horovod: built after 0m0")


def test_a_failure_names_the_log(tmp_path):
    with pytest.raises(UserError, match="the build failed") as error:
        run(3, tmp_path / "log", io.StringIO())
    assert str(tmp_path / "log") in str(error.value)


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("/usr/bin/ld: final link failed: No space left on device", "HOROVOD_LM_CACHE"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "--jobs 1"),
        ("cc1plus: out of memory allocating 65536 bytes: error", "--jobs 1"),
        ("x.h:12:10: fatal error: Python.h: No such file or directory", "python3-dev"),
        ("CMake Error at FindPackage: Could NOT find NCCL (missing: NCCL_LIBRARY)", "--no-nccl"),
        ("CMake Error: Could NOT find MPI_CXX", "--mpi"),
        ("c10.h:3:2: error: #error You need C++20 to compile PyTorch", "CXX"),
        ("CMake Error: CMake 3.26 or higher is required.  You are running 3.18", "cmake"),
        ("foo.cc:1:1: error: something nobody has seen before", "run again"),
    ],
)
def test_a_failure_shows_the_line_that_matters_and_a_cure(tmp_path, line, cure):
    noise = [f"[ {n}%] Building CXX object file{n}.o -Wno-error=x" for n in range(10, 99)]
    message = explain_failure([*noise, line, *noise], tmp_path / "log")
    said, advice = message.split("What to do: ")
    assert line in said and "Wno-error" not in said
    assert cure in advice


def test_an_interrupt_takes_every_process_of_the_build_along(tmp_path, monkeypatch):
    def children() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))

    before = children()  # other tests of this process may have some
    script = "import subprocess, sys; print('go', flush=True);"
    script += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"

    def interrupt(progress: Progress, line: str) -> None:
        deadline = time.monotonic() + 20
        while len(children() - before) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(children() - before) >= 2
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_with_progress(
            [sys.executable, "-c", script], {}, tmp_path / "log", "Horovod", io.StringIO()
        )
    assert not [child for child in children() - before if alive(child)]
